"""Configs: every mistake gives a one-line error before torch is imported."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT, repository_files

from mf_dist.config.loader import from_tree, to_tree
from mf_dist.config.objectives import AlphaFlowConfig, ImfConfig, MeanFlowConfig, SolutionFlowConfig
from mf_dist.config.schema import Config, ImfDitConfig, load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.launch import rank_from_environment

DIGITS = str(ROOT / "configs/digits_cpu.yaml")
LATENT = ["model.latent_size=8", "model.latent_channels=4", "model.num_classes=10", "data.path=none"]

IMF = ["model.network=imf_dit"]


def load(*overrides, world_size=1):
    return resolve(load_config(DIGITS, [*LATENT, *overrides]), None, world_size)


WRONG = [
    (["train.total_image=1"], r"train\.total_image; did you mean train\.total_images\?"),
    (["nonsense=1"], "unknown key nonsense; known keys: run_dir"),
    (["model.depht=2"], r"did you mean model\.depth\?"),
    (["model.depth=two"], r"model\.depth: expected a whole number >= 1, got 'two'"),
    (["model.depth=0"], r"model\.depth: expected a whole number >= 1, got 0"),
    (["model.depth=1.5"], r"model\.depth: expected a whole number"),
    (["model.depth=true"], r"model\.depth: expected a whole number"),
    (["model.depth="], r"model\.depth: expected a whole number"),
    (["model=7"], "model: expected a section"),
    (["optim.lr=-1"], r"optim\.lr: expected a number > 0"),
    (["optim.lr=fast"], r"optim\.lr: expected a number > 0, got 'fast'"),
    (["optim.lr=nan"], r"optim\.lr: expected"),
    (["optim.lr=inf"], r"optim\.lr: expected"),
    (["optim.beta2=1"], r"optim\.beta2: expected a number in \[0, 1\)"),
    (["optim.ema_warmup=yes please"], r"optim\.ema_warmup: expected true or false"),
    (["optim.ema_decay=1.5"], r"optim\.ema_decay"),
    (["engine.zero_stage=0"], r"engine\.zero_stage: expected 1, 2 or 3 \(stage 0 trains wrongly in bf16"),
    (["engine.precision=fp16"], r"engine\.precision: expected bf16 or fp32, got 'fp16'"),
    (["log.wandb=maybe"], r"log\.wandb: expected off or online or offline"),
    (["meanflow.share_r_equals_t=3/0"], r"share_r_equals_t: expected a fraction"),
    (["meanflow.share_r_equals_t=1.2"], r"share_r_equals_t: expected a fraction"),
    (["meanflow.label_drop=2"], r"label_drop: expected a number in \[0, 1\]"),
    (["meanflow.kappa=1"], "kappa 1.0 must be below 1"),
    (["meanflow.guidance_start=0.9", "meanflow.guidance_end=0.1"], "guidance_start 0.9 is above"),
    (["meanflow.share_r_equals_t=2/3"], "is not a whole number of rows; choose a multiple of 3"),
    (["train.micro_batch=3"], "train.batch_size 64 is not a multiple of 1 ranks x train.micro_batch 3"),
    (["train.total_images=10"], "less than one batch of 64"),
    (["model.patch_size=3"], "model.patch_size 3 does not divide model.latent_size 8"),
    (["model.num_heads=3"], "model.num_heads 3 does not divide model.hidden_size 128"),
    (["model.hidden_size=126", "model.num_heads=3"], "not a multiple of 4"),
    (["model.network=unet"], r"model\.network: expected dit or imf_dit, got 'unet'"),
    (["model.imf_dit.head_depth=1"], r"model\.imf_dit is for model\.network=imf_dit, not dit: leave it out"),
    (["model.imf_dit.heads=1"], r"unknown key model\.imf_dit\.heads; did you mean model\.imf_dit\.head_depth"),
    ([*IMF, "model.imf_dit.time_tokens=0"], r"time_tokens: expected a whole number >= 1"),
    ([*IMF, "model.depth=8"], r"head_depth 8 leaves none of model\.depth 8 to be shared"),
    ([*IMF, "model.depth=9", "model.hidden_size=126", "model.num_heads=6"], "126 / model.num_heads 6 is odd"),
    ([*IMF, "model.depth=9"], r"meanflow trains model\.network=dit, not imf_dit"),
    (["eval.guidance=2"], r"eval\.guidance and eval\.interval are for networks that take guidance as an input"),
    (["eval.interval=[0,1]"], r"eval\.guidance and eval\.interval are for networks that take guidance"),
    (["model.num_classes=0"], "guidance needs classes"),
    (["meanflow.label_drop=0"], "guidance needs the null class"),
    (["train.seed=-1"], r"train\.seed: expected a whole number from 0"),
    (["train.seed=18446744073709551616"], r"train\.seed"),
    (["run_dir=null"], r"run_dir: expected a non-empty string"),
    (["run_dir=a\nb"], r"run_dir: expected a non-empty string without line breaks, in UTF-8, got 'a\\nb'"),
    (["train.total_images=06400"], r"expected a whole number >= 1, got '06400' \(numbers are decimal, without leading"),
    (["train.total_images=0x1900"], "got '0x1900' .numbers are decimal"),
    (["train.total_images=0b11"], "got '0b11'"),
    (["train.total_images=1e5"], "got '1e5'"),
    (["train.total_images=1__0"], "got '1__0'"),
    (["train.total_images=٦٤٠٠"], "got '٦٤٠٠'"),
    (["train.max_hours=1:30"], r"expected a number >= 0, got '1:30' \(numbers are decimal"),
    (["train.max_hours=010.5"], r"expected a number >= 0, got '010.5'"),
    (["train.max_hours=.inf"], r"expected a number >= 0, got '\.inf'"),
    (["train.max_hours=1e999"], "train.max_hours: expected a number >= 0"),
    (["meanflow.share_r_equals_t=1:2"], "share_r_equals_t: expected a fraction"),
    (["meanflow.share_r_equals_t=1e999999999"], "share_r_equals_t: expected a fraction"),
    (["eval.nfe=[1, 010]"], r"eval\.nfe"),
    (["data.flip=y"], r"data\.flip: expected true or false, got 'y'"),
    (["log.wandb=no"], r"log\.wandb: expected off or online or offline, got 'no'"),
    (["train.seed=[1]"], r"train\.seed"),
    (["eval.nfe=0"], r"eval\.nfe: expected whole numbers >= 1"),
    (["eval.nfe=[1, x]"], r"eval\.nfe"),
    (["eval.every_images=64", "eval.reference="], r"eval\.every_images needs eval\.reference"),
    (["eval.every_images=64", "eval.training_emas=0.5"], r"eval\.training_emas has 0\.5, which is not among"),
    (["run_dir="], "run_dir"),
    (["train"], "expected section.key=value"),
    (["run_dir.x=1"], "'run_dir' is a value, not a section"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_mistake_is_named(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections"),
        ("run_dir: [", "not valid YAML, line 1"),
        ("run_dir: a\nrun_dir: b\n", "duplicate key 'run_dir', line 1"),
        ("run_dir: a\n", "data is missing"),
        ("\x00", "not valid YAML"),
        ("", "expected sections"),
        ("run_dir: 2026-02-31", "data is missing"),
        ("run_dir: !!str a", "data is missing"),
        ("run_dir: a\ntrain: {seed: !!int 3}", r"line 2: the tag tag:yaml.org,2002:int is not supported"),
        ("a: &a [*a]", "line 1: an alias stands for something that contains it"),
        ("<<: 3", "<< needs the alias of a section"),
        ("[a]: 3", "a key is not a text"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: " + 2000 * "[", "not valid YAML"),
        ("run_dir: a\ndata: {path: b}\nmodel: 1\ntrain: {total_images: 06400}", r"model: expected a section"),
    ],
)
def test_invalid_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(path), [])
    assert str(path) in str(error.value)


def test_ranks_must_divide_the_batch():
    assert load(world_size=4).train.micro_batch == 16
    with pytest.raises(UserError, match="not a multiple of 3 ranks x train.micro_batch 21"):
        load(world_size=3)
    with pytest.raises(UserError, match="ranks"):
        load(world_size=128)


def test_number_list_and_off_notations():
    config = load("optim.lr=1e-4", "meanflow.share_r_equals_t=0.75", "train.total_images=1_000", "eval.nfe=[1, 4]")
    assert config.optim.lr == 1e-4 and config.meanflow.share_r_equals_t == Fraction(3, 4)
    assert config.train.total_images == 1000 and config.eval.nfe == (1, 4)
    assert load("log.wandb=off").log.wandb == "off"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "runs/exp #3",
            "2026-02-03",
            "1:30",
            "06400",
            "1e5",
            "yes",
            "off",
            "0x10",
            "a: b",
            "[a",
            "{a}",
            "*a",
            "&a b",
            "@b",
        ),
        *("!!int 3", "it's", "- a", "%a", "a # b", " a ", "Größe", "1_000", ".nan", "a\\b"),
    ],
)
def test_texts_are_taken_as_typed(tmp_path, text):
    """By an override, and quoted in a file, where YAML needs it for some."""
    assert load(f"run_dir={text}").run_dir == text
    assert load(f"eval.reference={text}").eval.reference == text
    path = tmp_path / "config.yaml"
    path.write_text(Path(DIGITS).read_text().replace("run_dir: runs/digits", f"run_dir: {json.dumps(text)}"))
    assert load_config(str(path), []).run_dir == text


def test_values_of_a_file_are_read_by_the_type_of_their_field(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run_dir: 2026-02-03  # a comment\n"
        "data: {path: 1:30, stage_dir: ~, flip: Yes}\n"
        "model: &model {depth: 12, hidden_size: 768, num_heads: 12, patch_size: 2}\n"
        "optim: {lr: 1e-4, ema_decay: [0.99, .9]}\n"
        "train: {total_images: 1_000}\n"
        "log: {wandb: off}\n"
        "eval: {reference: null, vae: 'null', inception_weights: no, features: 1e5}\n"
        "meanflow:\n"
    )
    config = load_config(str(path), [])
    assert (config.run_dir, config.data.path, config.data.stage_dir, config.data.flip) == (
        "2026-02-03",
        "1:30",
        None,
        True,
    )
    assert (config.optim.lr, config.optim.ema_decay, config.train.total_images) == (1e-4, (0.99, 0.9), 1000)
    settings = config.eval
    assert (settings.reference, settings.vae, settings.inception_weights, settings.features) == (
        None,
        "null",
        "no",
        "1e5",
    )
    path.write_text(path.read_text().replace("1_000", "06400"))
    with pytest.raises(UserError, match="train.total_images: expected a whole number >= 1, got '06400'"):
        load_config(str(path), [])


def test_quoted_lists_and_sections_of_overrides():
    config = load("run_dir='a b'", 'eval.vae="null"', "optim={lr: 1, beta1: 0.5}", "optim.beta2=.25", "eval.vae=' x'")
    assert (config.run_dir, config.eval.vae) == ("a b", " x")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (1, 0.5, 0.25)


def test_aliases_and_merged_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run_dir: a\ndata: {path: b}\ntrain: {total_images: 640}\n"
        "model: {depth: &n 2, hidden_size: 32, num_heads: *n, patch_size: *n}\n"
        "log: &log {every_steps: 7}\n"
    )
    assert load_config(str(path), ["log.every_steps=9", "meanflow.kappa=0"]).model.num_heads == 2
    path.write_text(path.read_text() + "meanflow: {<<: [{kappa: 0.5}, {kappa: 0.25, omega: 2}], omega: 3}\n")
    assert load_config(str(path), []).meanflow.kappa == 0.5 and load_config(str(path), []).meanflow.omega == 3


def test_a_config_has_one_objective(tmp_path):
    assert load("meanflow.kappa=0").objective_section == "meanflow"
    with pytest.raises(
        UserError, match=r"digits_cpu.yaml: the config has meanflow and solution_flow, expected exactly"
    ):
        load("solution_flow.kappa=0")
    text = Path(DIGITS).read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("meanflow:\n  omega: 1.0\n  kappa", "alpha_flow:\n  kappa"))
    assert load_config(str(path), []).objective == AlphaFlowConfig(kappa=0.35)
    path.write_text("run_dir: a\ndata: {path: b}\nmodel: {depth: 1, hidden_size: 4, num_heads: 1, patch_size: 1}\n")
    with pytest.raises(UserError, match="train is missing"):
        load_config(str(path), [])
    path.write_text(path.read_text() + "train: {total_images: 1}\n")
    with pytest.raises(UserError, match="has none, expected exactly one objective: meanflow, solution"):
        load_config(str(path), [])


def test_from_tree_inverts_to_tree():
    config = load()
    assert from_tree(Config, to_tree(config), "tree") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.network=dit"], r"model\.imf_dit is for model\.network=imf_dit, not dit"),
        (["imf.share_r_equals_t=1"], r"imf\.share_r_equals_t must be below 1"),
        (["imf.omega_max=0.5"], r"imf\.omega_max 0\.5 must be at least 1"),
        (["imf.label_drop=0"], r"imf\.label_drop 0\.0 must be above 0, for the null class"),
        (["imf.label_drop=0.6"], r"imf\.label_drop 0\.6 must be above 0, .* and at most share_r_equals_t 1/2"),
        (["model.num_classes=0"], "imf is trained with guidance, which needs classes"),
        (["eval.guidance=0.5"], r"eval\.guidance: expected a number >= 1, got 0\.5"),
        (["eval.interval=[0.6,0.4]"], r"eval\.interval: expected start, end with 0 <= start <= end <= 1"),
        (["eval.interval=0.4"], r"eval\.interval: expected start, end"),
        (["meanflow.kappa=0"], "the config has meanflow and imf, expected exactly one objective"),
    ],
)
def test_mistake_in_a_config_of_imf_is_named(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(load_config(str(ROOT / "configs/digits_imf_cpu.yaml"), [*LATENT, *overrides]), None, 1)
    assert "\n" not in str(error.value)


def test_the_section_of_imf_dit_is_complete_or_not_there(monkeypatch):
    """A DiT's config is written as before there was another network; iMF's with the numbers that were in force."""
    assert "imf_dit" not in to_tree(load())["model"]
    monkeypatch.setattr(MeanFlowConfig, "NETWORKS", ("imf_dit",))
    config = load(*IMF, "model.depth=9")
    assert config.model.imf_dit == ImfDitConfig(8, 8, 4, 2, 2, 4)
    assert from_tree(Config, to_tree(config), "tree") == config
    assert load(*IMF, "model.imf_dit.head_depth=1").model.imf_dit == ImfDitConfig(head_depth=1)


def test_manifest_completes_the_config_and_must_match(latents):
    manifest = read_manifest(latents)
    config = load_config(DIGITS, [f"data.path={latents}"])
    assert resolve(config, manifest, 1).model.num_classes == 10
    with pytest.raises(UserError, match=r"model\.num_classes is 9, but the dataset .* has 10"):
        resolve(load_config(DIGITS, ["model.num_classes=9"]), manifest, 1)
    with pytest.raises(UserError, match="is not set and there is no dataset"):
        resolve(config, None, 1)


@pytest.mark.parametrize("path", repository_files("configs", "*.yaml", 11), ids=lambda path: path.stem)
def test_shipped_configs_resolve_and_have_a_header(path):
    shape = [] if path.stem.startswith("imagenet") else LATENT
    resolve(load_config(str(path), shape), None, 8 if path.stem.startswith("imagenet") else 1)
    header = path.read_text().split("run_dir:")[0]
    for word in ("ommand", "ardware", "ours", "xpected") if "custom" not in path.stem else ("ardware", "ours"):
        assert word in header, f"{path.name}'s header lacks {word!r}"


TABLE = {  # depth, width, heads, patch, omega, kappa, interval, epochs: the paper's Table 4
    "b4": (12, 768, 12, 4, 1.0, 0.5, (0.0, 1.0), 240),
    "b2": (12, 768, 12, 2, 1.0, 0.5, (0.0, 1.0), 240),
    "m2": (16, 1024, 16, 2, 1.0, 0.5, (0.0, 1.0), 240),
    "l2": (24, 1024, 16, 2, 0.2, 0.92, (0.0, 0.8), 240),
    "xl2": (28, 1152, 16, 2, 0.2, 0.92, (0.0, 0.75), 240),
    "xl2plus": (28, 1152, 16, 2, 1.0, 0.5, (0.3, 0.8), 1000),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_match_the_paper(name):
    config = load_config(str(ROOT / f"configs/imagenet256_{name}.yaml"), [])
    m, g, o = config.model, config.meanflow, config.optim
    epochs = config.steps_left(0) / 5004
    assert TABLE[name] == (
        m.depth,
        m.hidden_size,
        m.num_heads,
        m.patch_size,
        g.omega,
        g.kappa,
        (g.guidance_start, g.guidance_end),
        epochs,
    )
    rest = {field.name: getattr(g, field.name) for field in dataclasses.fields(MeanFlowConfig)}
    for varied in ("omega", "kappa", "guidance_start", "guidance_end"):
        del rest[varied]
    assert rest == {
        "tangent": "guided",
        "gap_weight": "uniform",
        "share_r_equals_t": Fraction(3, 4),
        "time_mean": -0.4,
        "time_std": 1.0,
        "label_drop": 0.1,
        "adaptive_eps": 0.01,
        "adaptive_p": 1.0,
    }
    assert (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.ema_decay, o.ema_warmup) == (
        1e-4,
        0.9,
        0.95,
        1e-8,
        0.0,
        (0.9999,),
        False,
    )
    assert config.train.batch_size == 256
    assert (m.latent_size, m.latent_channels, m.num_classes) == (32, 4, 1000)


def test_presets_of_other_targets_match_their_papers():
    def preset(name):
        config = load_config(str(ROOT / f"configs/imagenet256_{name}.yaml"), [])
        return config, config.objective, config.steps_left(0)

    config, boundary, _ = preset("xl2_boundary")
    plain, guided, _ = preset("xl2")
    assert boundary == dataclasses.replace(guided, tangent="boundary")
    assert dataclasses.replace(config, run_dir=plain.run_dir, meanflow=guided) == plain
    for size in ("b2", "xl2"):
        config, objective, steps = preset(f"{size}_solution_flow")
        assert objective == SolutionFlowConfig() and config.optim.beta2 == 0.99 and steps == 240 * 5004
        # guidance 3 mixed with 1/4 of it and 3/4 of u(z, t, t | y)
        assert (objective.omega, objective.kappa) == (0.25 * 3, 1 - 0.25)
    for size, share, guidance, window in (
        ("b2", Fraction(1, 4), (1.0, 0.5, 1.0), (0, 1_200_960)),
        ("xl2", Fraction(1, 2), (0.2, 0.92, 0.75), (600_000, 1_000_000)),
    ):
        config, objective, steps = preset(f"{size}_alpha_flow")
        assert objective.share_r_equals_t == share and steps == 1_200_960
        assert (objective.omega, objective.kappa, objective.guidance_end) == guidance
        assert (objective.window_start * steps, objective.window_end * steps) == pytest.approx(window, rel=1e-3)
        assert config.model == preset(size)[0].model and config.optim == preset(size)[0].optim


@pytest.mark.parametrize(
    ("size", "shape", "guidance"),
    [
        ("b2", (12, 768, 12), (8.0, 0.4, 0.65)),
        ("m2", (24, 768, 12), (10.5, 0.4, 0.6)),
        ("l2", (32, 1024, 16), (10.5, 0.4, 0.6)),
        ("xl2", (48, 1024, 16), (8.0, 0.42, 0.62)),
    ],
)
def test_presets_of_imf_match_the_authors(size, shape, guidance):
    """Their configs/train_config.yml, default.py and eval_config.yml, models/imfDiT.py and utils/vae_util.py."""
    config = load_config(str(ROOT / f"configs/imagenet256_imf_{size}.yaml"), [])
    model, optim, train = config.model, config.optim, config.train
    assert config.imf == ImfConfig() and model.imf_dit == ImfDitConfig()
    assert (model.depth, model.hidden_size, model.num_heads) == shape and config.guidance == guidance
    assert (train.batch_size, config.steps_left(0), train.seed) == (1024, 640 * (1_281_167 // 1024), 42)
    assert optim.warmup_images == 10 * (1_281_167 // 1024) * 1024
    assert (optim.lr, optim.beta1, optim.beta2, optim.ema_decay) == (1e-4, 0.9, 0.95, (0.9999,))
    assert optim.weight_decay == optim.grad_clip == 0
    assert config.data.normalisation == "channel" and config.eval.labels == "balanced"
    assert config.data.normalisation_mean == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert config.data.normalisation_std == (4.85503674, 5.31922414, 3.93725398, 3.9870003)


def test_wrong_command_line_fails_within_two_seconds_without_torch():
    program = (
        "import sys; from mf_dist.train import main; code = main(); "
        "assert not {'torch', 'deepspeed', 'diffusers'} & set(sys.modules), 'heavy import'; sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, DIGITS, "optim.lrr=1"], capture_output=True, text=True, timeout=60
    )
    assert time.perf_counter() - start < 2
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {DIGITS}: unknown key optim.lrr; did you mean optim.lr?"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "RANK 0 is not below WORLD_SIZE 0"),
        ({"RANK": "1"}, "RANK 1 is not below WORLD_SIZE 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
    ],
)
def test_invalid_launcher_environment_is_named(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        rank_from_environment()


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("gpu-a[007-009,12]", "gpu-a007"), ("a3,b[1-2]", "a3"), ("n[10,12]", "n10")]
)
def test_tasks_of_srun_are_ranks(monkeypatch, nodes, first):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # monkeypatch restores it after the test
        monkeypatch.delenv(name)
    variables = {
        "STEP_NUM_TASKS": "4",
        "STEP_NODELIST": nodes,
        "STEP_ID": "2",
        "PROCID": "3",
        "LOCALID": "1",
        "JOB_ID": "70123",
    }
    for name, value in variables.items():
        monkeypatch.setenv("SLURM_" + name, value)
    assert rank_from_environment() == (3, 4, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "31970")
    monkeypatch.setenv("RANK", "0")  # torchrun takes precedence
    assert rank_from_environment().rank == 0


def test_unparsable_node_list_is_an_error(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    variables = {"STEP_NUM_TASKS": "4", "STEP_NODELIST": "rack[1-2]n[3-4]", "STEP_ID": "2", "PROCID": "3"}
    for name, value in (variables | {"LOCALID": "1", "JOB_ID": "7"}).items():
        monkeypatch.setenv("SLURM_" + name, value)
    with pytest.raises(UserError, match=r"first node of 'rack\[1-2\]n\[3-4\]'; set MASTER_ADDR"):
        rank_from_environment()
    monkeypatch.setenv("MASTER_ADDR", "rack1n3")
    assert rank_from_environment().world_size == 4 and os.environ["MASTER_ADDR"] == "rack1n3"


@pytest.mark.parametrize(
    "step", [{"STEP_NUM_TASKS": "1"}, {}, {"STEP_NUM_TASKS": "8", "STEP_ID": "0", "LOCALID": "0", "PTY_PORT": "40001"}]
)
def test_single_task_is_rank_0_of_1(monkeypatch, step):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "0", "JOB_ID": "7", "STEP_NODELIST": "n1", **step}.items():
        monkeypatch.setenv("SLURM_" + name, value)
    assert rank_from_environment() == (0, 1, 0)


def test_dry_run_prints_config_shapes_and_cost():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mf_dist.train",
            str(ROOT / "configs/imagenet256_xl2.yaml"),
            "--dry-run",
            "log.every_steps=7",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "omega: 0.2",
        "(4, 32, 32), 256 tokens",
        "676,440,592",
        "237 GFLOP",
        "1,200,960 steps",
        "4.75 forwards",
    ):
        assert text in done.stdout
