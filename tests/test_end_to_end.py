"""The commands as a user runs them, on real digits: train, resume, evaluate, sample."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import FEATURES, ROOT, TINY, VAE, encode, run_here, run_python, write_digits
from PIL import Image
from safetensors.numpy import load_file, save_file

from mf_dist.checkpoint.model_folder import new_folder
from mf_dist.checkpoint.reader import find_checkpoint, open_checkpoint
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import load_trained_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents, images):
    """Two runs of the same 6 steps: `whole` uninterrupted, `parts` stopped after 3 and resumed by the same command."""
    root = tmp_path_factory.mktemp("runs")
    outputs = {}
    for name, lengths in {"whole": [96], "parts": [48, 96]}.items():
        config = root / f"{name}.yaml"
        config.write_text(TINY.format(run=root / name, latents=latents, features=FEATURES, images=images))
        outputs[name] = [run_python("-m", "mf_dist.train", config, f"train.total_images={n}") for n in lengths]
    return root, outputs


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs):
    root, outputs = runs
    assert "from scratch" in outputs["parts"][0].stdout
    assert "resuming" in outputs["parts"][1].stdout and "step-00000003" in outputs["parts"][1].stdout
    files = ["master", "exp_avg", "exp_avg_sq", "ema-0.99"]
    for kind in files:
        whole = load_file(root / "whole/checkpoints/step-00000006" / f"{kind}.safetensors")
        parts = load_file(root / "parts/checkpoints/step-00000006" / f"{kind}.safetensors")
        assert whole.keys() == parts.keys() and len(whole) > 20
        for name, tensor in whole.items():
            assert np.array_equal(tensor, parts[name]), f"{kind} of {name} differs"
    start = load_file(root / "whole/checkpoints/step-00000003/master.safetensors")
    end = load_file(root / "whole/checkpoints/step-00000006/master.safetensors")
    assert all(not np.array_equal(start[name], end[name]) for name in ("patch_out.weight", "patch_out.bias"))


def test_finished_run_ends_at_once(runs):
    root, _ = runs
    again = run_python("-m", "mf_dist.train", root / "whole.yaml")
    assert "resuming" in again.stdout and "finished at step 6" in again.stdout
    assert [m["step"] for m in metrics(root / "whole")] == [2, 3, 4, 6]


def test_another_batch_size_continues_with_the_next_image(runs):
    """From image 48: one batch of 32 and 10 images less than another."""
    root, _ = runs
    shutil.copytree(root / "whole/checkpoints/step-00000003", root / "other/checkpoints/step-00000003")
    sizes = ["train.batch_size=32", "train.total_images=90", f"run_dir={root / 'other'}"]
    done = run_python("-m", "mf_dist.train", root / "whole.yaml", *sizes, "--allow-config-change")
    assert (
        "32 does not divide the 42 images left of train.total_images 90: the last 10 are not trained on" in done.stdout
    )
    assert "finished at step 4 (80 images)" in done.stdout
    assert [(m["step"], m["samples_seen"]) for m in metrics(root / "other")] == [(4, 80)]
    state = open_checkpoint(root / "other/checkpoints/step-00000004").state
    assert (state["samples_seen"], state["saved_images_ago"]) == (80, 32)


def test_metrics_have_every_field(runs):
    root, _ = runs
    for m in metrics(root / "whole"):
        assert {
            "raw_loss_r_equals_t",
            "raw_loss_r_below_t",
            "loss",
            "v_loss",
            "du_dt_norm",
            "grad_norm",
            "lr",
            "images_per_second",
            "memory_gib",
            "data_wait_share",
            "samples_seen",
        } <= m.keys()
        assert all(np.isfinite(value) for value in m.values())
        assert m["samples_seen"] == 16 * m["step"] and m["lr"] == 1e-3
        assert 0.9 < m["loss"] <= 1  # the adaptive weight: s / (s + eps)
    assert {m["step"] for m in metrics(root / "parts")} == {2, 3, 4, 6}


def test_sample_grids_have_one_two_and_four_steps_side_by_side(runs):
    root, _ = runs
    names = sorted(path.name for path in (root / "whole/samples").iterdir())
    assert names == ["step00000003.png", "step00000006.png"]
    width, height = Image.open(root / "whole/samples" / names[0]).size
    assert 3 * 4 * 66 < width < 3 * 4 * 66 + 60 and height == 16 + 10 * 66
    whole, parts = (np.asarray(Image.open(root / run / "samples" / names[-1])) for run in ("whole", "parts"))
    assert np.array_equal(whole, parts)


def test_checkpoint_state_describes_the_model(runs):
    root, _ = runs
    state = open_checkpoint(root / "whole/checkpoints/step-00000006").state
    assert state["samples_seen"] == 96 and state["config"]["model"]["num_classes"] == 10
    assert state["versions"]["torch"] and state["vae"]["sha256"] and state["classes"] == [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def evaluated(runs):
    """The command's output, the entries of metrics.json, and the folder, for 60 samples at 1 and 2 steps."""
    root, _ = runs
    done = run_python("tools/fid_eval.py", "--checkpoint", root / "whole", "--nfe", "1,2", "--save-npz")
    out = root / "whole/eval"
    return done, json.loads((out / "metrics.json").read_text()), out


def test_evaluation_records_its_inputs(runs, evaluated):
    root, _ = runs
    done, entries, out = evaluated
    assert done.stdout.splitlines()[0] == f"evaluating {root / 'whole/checkpoints/step-00000006'}"
    assert "fd_digits_60" in done.stdout and "FID" not in done.stdout and "reference" in done.stderr
    assert [e["nfe"] for e in entries] == [1, 2] and all(e["num_samples"] == 60 for e in entries)
    assert entries[0]["metrics"]["fd_digits_60"] != entries[1]["metrics"]["fd_digits_60"]
    for key in ("checkpoint_sha256", "vae_sha256", "features_sha256", "reference_sha256", "pixels_sha256"):
        assert len(entries[0][key]) == 64
    assert entries[0]["seconds"].keys() >= {"sample", "decode", "features", "statistics", "fid"}
    assert entries[0]["arguments"]["save_npz"] is True and entries[0]["labels"] == "balanced"
    assert {"grid_nfe1.png", "grid_steps.png", "neighbours_nfe1.png"} <= {path.name for path in out.iterdir()}
    assert not (out / "work").exists()


def test_images_do_not_depend_on_their_number(runs, evaluated, tmp_path):
    """23 samples with the explicit time grid [1, 0] equal the first 23 of 60 samples in one step."""
    root, _ = runs
    with np.load(evaluated[2] / "samples_nfe1.npz") as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    assert pixels.shape == (60, 32, 32, 3) and pixels.dtype == np.uint8
    assert np.array_equal(labels, np.arange(60) % 10)
    run_python(
        "tools/fid_eval.py",
        "--checkpoint",
        root / "whole",
        "--times",
        "1,0",
        "--num-samples",
        23,
        "--save-npz",
        "--save-images",
        3,
        "--metrics",
        "fid",
        "--out",
        tmp_path,
    )
    with np.load(tmp_path / "samples_nfe1_times.npz") as file:
        assert np.array_equal(file["arr_0"], pixels[:23])
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    assert entry["times"] == [1, 0] and entry["metrics"].keys() == {"fd_digits_23"} and entry["warnings"]
    assert len(list((tmp_path / "images_nfe1_times").iterdir())) == 3


def test_reference_statistics_file_equals_the_images(images, runs, evaluated, tmp_path):
    """A file of reference_stats.py gives the same metrics as the images, and records its source."""
    root, _ = runs
    stats = tmp_path / "stats.npz"
    done = run_python("tools/reference_stats.py", "--images", images, "--features", FEATURES, "--out", stats)
    assert "150 images of side 32, features digits" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]
    run_python("tools/fid_eval.py", "--checkpoint", root / "whole", "--nfe", 1, "--reference", stats, "--out", tmp_path)
    (by_file,), by_images = json.loads((tmp_path / "metrics.json").read_text()), evaluated[1][0]
    assert by_file["metrics"] == by_images["metrics"] and by_file["pixels_sha256"] == by_images["pixels_sha256"]
    assert by_file["reference_made"]["images_sha256"] == by_images["reference_sha256"]


def test_repeats_protocol_and_comparison(images, runs, tmp_path):
    """EDM2's protocol is three seeds with truncated pixels; the same command again measures only what is missing."""
    root, _ = runs
    few = ("--checkpoint", root / "whole", "--nfe", 1, "--metrics", "fid", "--num-samples", 100)

    def entries(out):
        return json.loads((tmp_path / out / "metrics.json").read_text())

    edm2 = (*few, "--protocol", "edm2", "--save-npz", "--out", tmp_path / "edm2")
    text = run_here("tools/fid_eval.py", *edm2)[0]
    assert "protocol edm2: 50,000 images, random labels, truncated pixels" in text and "over 3 seeds, lowest" in text
    *seeds, total = entries("edm2")
    assert [entry["seed"] for entry in seeds] == total["seeds"] == [0, 1, 2] and total["protocol"] == "edm2"
    values = [entry["metrics"]["fd_digits_100"] for entry in seeds]
    assert total["metrics"]["fd_digits_100"] == pytest.approx(np.mean(values)) and len({*values}) == 3
    assert total["std"]["fd_digits_100"] == pytest.approx(np.std(values, ddof=1))
    assert total["lowest"]["fd_digits_100"] == min(values) and not (tmp_path / "edm2/work").exists()
    run_here("tools/fid_eval.py", *edm2)
    assert entries("edm2")[:2] == seeds[1:]  # as they were, with their seconds; the first is measured with its pictures
    run_here("tools/fid_eval.py", *few, "--labels", "random", "--save-npz", "--out", tmp_path / "adm")
    with np.load(tmp_path / "edm2/samples_nfe1.npz") as floor, np.load(tmp_path / "adm/samples_nfe1.npz") as rounded:
        darker = rounded["arr_0"].astype(int) - floor["arr_0"]
    assert np.unique(darker).tolist() == [0, 1] and 0.1 < darker.mean() < 0.6
    out = ("--labels", "random", "--out", tmp_path / "again", "--against")
    _, refusal = run_here("tools/fid_eval.py", *few, *out, tmp_path / "edm2", expect=2)
    assert "another protocol; its protocol is edm2, this one's adm" in refusal.splitlines()[-1]
    assert not (tmp_path / "again/metrics.json").exists()
    _, refusal = run_here("tools/fid_eval.py", *few, "--num-samples", 99, *out, tmp_path / "adm", expect=2)
    assert "--against needs the band of fd_digits_99: fewer than 100 images" in refusal.splitlines()[-1]
    text, warning = run_here("tools/fid_eval.py", *few, "--seed", 1000, *out, tmp_path / "adm")
    assert "at 95 %, no more than noise" in text and "seed 1000 is eval.training_seed" in warning
    files = ("--images", tmp_path / "adm/samples_nfe1.npz", "--features", FEATURES, "--reference", images)
    files += ("--protocol", "adm", "--out", tmp_path / "files", "--against", tmp_path / "adm")
    text, _ = run_here("tools/fid_eval.py", *files)
    assert "protocol adm: 50,000 images, random labels, rounded pixels" in text and "(nfe 1, step " in text
    assert "+- 0 at" not in text and "how images from files were made is not known" in text


def test_measuring_a_folder(images, tmp_path):
    done = run_python(
        "tools/fid_eval.py", "--images", images, "--features", FEATURES, "--reference", images, "--out", tmp_path
    )
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    assert abs(entry["metrics"]["fd_digits_150"]) < 1e-6
    assert entry["num_samples"] == entry["reference_images"] == 150 and (tmp_path / "neighbours.png").is_file()
    assert "fd_digits_150" in done.stdout


def test_sampling_one_class(runs, tmp_path):
    root, _ = runs
    out = tmp_path / "grid.png"
    run_python("tools/sample.py", "--checkpoint", root / "whole", "--class", 3, "--nfe", 1, "--out", out)
    width, height = Image.open(out).size
    assert height == 66 and width > 8 * 64
    wrong = run_python("tools/sample.py", "--checkpoint", root / "whole", "--class", 10, expect=2)
    assert wrong.stderr.splitlines() == ["error: class 10 is not in 0..9"]
    listed = run_python("tools/sample.py", "--checkpoint", root / "whole", "--classes", "list")
    assert listed.stdout.splitlines() == [f"class {number}: {number}" for number in range(10)]


@pytest.mark.parametrize(
    ("tool", "options", "leave_out"),
    [
        ("tools/fid_eval.py", ["--guidance", 2], "leave out --guidance and --interval"),
        ("tools/fid_eval.py", ["--interval", "0.4,0.65"], "leave out --guidance and --interval"),
        ("tools/fid_eval.py", ["--sweep", "guidance=2:4:1"], "leave out --sweep"),
        ("tools/sample.py", ["--guidance", 2], "leave out --guidance and --interval"),
    ],
)
def test_a_network_without_guidance_as_an_input_refuses_its_options(runs, tmp_path, tool, options, leave_out):
    run, out = runs[0] / "whole", tmp_path / "out.png"
    _, err = run_here(tool, "--checkpoint", run, *options, "--out", out, expect=2)
    assert err == (
        f"error: {run / 'checkpoints/step-00000006'} has a network without guidance as an input (model.network=dit): "
        f"{leave_out}\n"
    )
    assert not out.exists()


def test_an_exported_ema_is_sampled_like_its_run(runs, tmp_path):
    root, _ = runs
    exported = tmp_path / "ema.safetensors"
    run_python("tools/checkpoint.py", "export", root / "whole", "--out", exported)
    within = root / "whole/checkpoints/step-00000006/ema-0.99.safetensors"
    models = []
    for path in (root / "whole", exported, within):
        trained = load_trained_model(find_checkpoint(path), None, None, torch.device("cpu"))
        assert (trained.ema_decay, trained.checkpoint.samples_seen, trained.class_names[9]) == ("0.99", 96, "9")
        models.append(trained.generator.net.state_dict())
    assert all(torch.equal(model[name], models[0][name]) for model in models for name in models[0])
    with pytest.raises(UserError, match="is not an EMA that tools/checkpoint.py export wrote .it holds exp_avg"):
        find_checkpoint(within.with_name("exp_avg.safetensors"))
    save_file(load_file(exported), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="it does not describe its model"):
        find_checkpoint(tmp_path / "bare.safetensors")
    refused = run_python("tools/fid_eval.py", "--checkpoint", exported, "--nfe", 1, expect=2)
    assert "is not in the folder checkpoints/ of a run: give --out FOLDER" in refused.stderr


def test_a_model_folder_stands_alone(runs, tmp_path):
    """The images of a copy, sampled with its own VAE, have the bits of the run's; its card has the run's numbers."""
    run, out = tmp_path / "run", tmp_path / "model"
    shutil.copytree(runs[0] / "whole", run)
    measured = {"metrics": {"fd_digits": 12.5}, "nfe": 2, "step": 6, "ema": "0.99", "labels": "balanced"}
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval/metrics.json").write_text(json.dumps([measured, {**measured, "step": 3}, {**measured, "sweep": True}]))
    run_python("tools/checkpoint.py", "export", run, "--out", out, "--with-vae")
    names = ["README.md", "config.json", "metrics.json", "model.safetensors", "samples.png", "vae"]
    assert sorted(path.name for path in out.iterdir()) == names
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    images = []
    for path in (run, moved, moved / "model.safetensors"):
        trained = load_trained_model(find_checkpoint(path), None, None, torch.device("cpu"))
        generator = trained.generator
        images.append(generator(*generator.draw(range(3), "random", 0, 1), [1.0, 0.0]))
        assert generator.vae.source == str(VAE if path == run else moved / "vae") and trained.class_names[9] == "9"
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    assert json.loads((moved / "metrics.json").read_text()) == [measured]
    card = (moved / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "mf_dist" and "meanflow" in front["tags"] and card.count("---\n") >= 2
    assert "| fd_digits | 12.5 | 2 |" in card and "(samples.png)" in card and "kappa: 0.5" in card
    described = json.loads((moved / "config.json").read_text())
    assert (described["ema"], described["samples_seen"], described["vae"]["source"]) == ("0.99", 96, str(VAE))
    (moved / "config.json").write_text(json.dumps({**described, "step": 7}))
    with pytest.raises(UserError, match="config.json differs from the description in model.safetensors"):
        find_checkpoint(moved)


def test_a_model_folder_appears_complete_or_not_at_all(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no empty folder"), new_folder(tmp_path / "used"):
        pass
    with pytest.raises(OSError), new_folder(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["used"] and len([*(tmp_path / "used").iterdir()]) == 1
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("whole")
        assert not [*(tmp_path / "empty").iterdir()]
    assert (tmp_path / "empty/a").read_text() == "whole" and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tools/fid_eval.py", "--checkpoint", "nowhere"], "error: no checkpoint in 'nowhere'"),
        (["tools/fid_eval.py", "--nfe", "0"], "error: --nfe must be from 1 to 10000, got 0"),
        (["tools/fid_eval.py", "--images", "x"], "error: --images needs"),
        (
            ["tools/fid_eval.py", "--images", "x", "--nfe", "2"],
            "error: --images measures all of a set of images: leave out --nfe",
        ),
        (
            ["tools/fid_eval.py", "--images", "x", "--features", "inception", "--reference", "y", "--out", "z"],
            "error: the Inception weights are missing: no --inception-weights given. On a machine with network run",
        ),
        (["tools/fid_eval.py", "--times", "1,0.5"], "error: --times must fall from 1 to 0"),
        (["tools/fid_eval.py", "--times", "1,nan,0"], "error: --times must fall from 1 to 0"),
        (["tools/fid_eval.py", "--nfe", "1,²"], "error: --nfe must be from 1 to 10000, got ²"),
        (["tools/reference_stats.py", "--images", "x", "--out", "x.npy"], "error: --out 'x.npy' must be"),
        (
            ["tools/sample.py", "--out", "grid.xyz"],
            "error: --out 'grid.xyz' must be a file name ending in .png, or a folder with --count",
        ),
        (["tools/demo/write_digits.py", "--out", "README.md/x"], "error:"),
        (
            ["tools/encode_latents.py", "--images", "x", "--out", "o", "--vae", "v", "--resolution", "0"],
            "error: --resolution",
        ),
        (["-m", "mf_dist.train", "configs/none.yaml"], "error: cannot read config 'configs/none.yaml'"),
        (
            [
                "-m",
                "mf_dist.train",
                "configs/digits_cpu.yaml",
                "data.path=nowhere",
                "model.latent_size=8",
                "model.latent_channels=4",
                "model.num_classes=10",
            ],
            "error: no finished dataset at 'nowhere'",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run_python(*arguments, expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


def test_changed_model_or_recipe_is_refused_on_resume(runs):
    root, _ = runs
    for change, text in {
        "model.depth=3": "has model.depth=2, now it is 3: choose another run_dir",
        "optim.ema_decay=0.5": "trained with optim.ema_decay=[0.99], now it is [0.5]",
    }.items():
        done = run_python("-m", "mf_dist.train", root / "whole.yaml", change, expect=2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error:") and text in line


def test_diverged_run_is_an_error_and_saves_nothing(tiny_config, tmp_path):
    done = run_python("-m", "mf_dist.train", tiny_config, "optim.lr=1e30", expect=2)
    (line,) = done.stderr.splitlines()
    assert "training diverged" in line and not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run/metrics.jsonl").exists()  # the first line would be that of step 2


def test_compiling_without_a_compiler_is_refused_and_training_without_works(tiny_config, tmp_path):
    """Also checks that DeepSpeed builds no extension."""
    command = ["-m", "mf_dist.train", tiny_config, "train.total_images=16", "log.sample_every_images=0"]
    env = {**os.environ, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    env.pop("CXX", None)
    (line,) = run_python(*command, "engine.compile=true", env=env, expect=2).stderr.splitlines()
    assert "needs a C++ compiler" in line
    run_python(*command, env=env)
    assert not (tmp_path / "extensions").exists()


def test_other_latents_are_refused(runs, tmp_path):
    root, _ = runs
    images = write_digits(tmp_path / "other", 40)
    run_python(
        "tools/encode_latents.py", "--images", images, "--out", tmp_path / "latents", "--vae", VAE, "--resolution", 32
    )
    done = run_python("-m", "mf_dist.train", root / "whole.yaml", f"data.path={tmp_path / 'latents'}", expect=2)
    assert "was trained with dataset.sha256" in done.stderr


@pytest.mark.dist
def test_unconditional_model_with_a_stale_build_lock(zygote, tiny_config, tmp_path):
    """No class folders; and the lock that a killed build of DeepSpeed's CPU all-reduce would leave behind."""
    images = write_digits(tmp_path / "flat", 40, classes=False)
    encode(images, tmp_path / "flat-latents")
    (tmp_path / "extensions/deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions/deepspeed_shm_comm/lock").touch()
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = ["-m", "mf_dist.train", tiny_config, f"data.path={tmp_path / 'flat-latents'}", "train.total_images=32"]
    refused = run_python(*command, expect=2)
    assert "guidance needs classes" in refused.stderr
    run_python(*command, "meanflow.kappa=0", env=env, timeout=120)
    command = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "grid.png"]
    assert zygote.run(tmp_path / "log", command, script=ROOT / "tools/sample.py") == [0]
    assert metrics(tmp_path / "run")[-1]["step"] == 2 and (tmp_path / "grid.png").is_file()


@pytest.mark.dist
def test_settings_of_another_cluster_matter_to_several_processes_only(tiny_config, tmp_path):
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "ib0", "MASTER_ADDR": "node17.invalid", "MASTER_PORT": "1"}
    env |= {"NCCL_SOCKET_IFNAME": "ib0", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "DS_ACCELERATOR": "cuda"}
    train = ["-m", "mf_dist.train", tiny_config]
    measure = ["tools/fid_eval.py", "--checkpoint", tmp_path / "run", "--nfe", 1, "--num-samples", 20]
    for command in (train, measure):
        run_python(*command, env=env)
        refused = run_python(*command, env={**env, "RANK": "0", "WORLD_SIZE": "2"}, expect=2)
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: GLOO_SOCKET_IFNAME is 'ib0': no interface ib0 with an address; ")


@pytest.mark.dist
def test_bf16_and_the_flow_baseline_train(zygote, tiny_config, tmp_path):
    options = ["engine.precision=bf16", "meanflow.share_r_equals_t=1", "meanflow.kappa=0", "train.total_images=32"]
    assert zygote.run(tmp_path / "log", [tiny_config, *options, "eval.nfe=3"]) == [0], (tmp_path / "log").read_text()
    (m,) = metrics(tmp_path / "run")
    assert m["raw_loss_r_below_t"] is None and np.isfinite(m["raw_loss_r_equals_t"])
    assert m["v_loss"] == pytest.approx(m["raw_loss_r_equals_t"])
    command = ["--checkpoint", tmp_path / "run", "--nfe", 3, "--num-samples", 20]
    refused = [*command, "--sampler", "restart"]
    assert zygote.run(tmp_path / "refused", refused, script=ROOT / "tools/fid_eval.py") == [2]
    assert "run of flow matching, sampled by Euler steps: leave out --sampler" in (tmp_path / "refused").read_text()
    assert zygote.run(tmp_path / "log", command, script=ROOT / "tools/fid_eval.py") == [0]
    (entry,) = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert entry["sampler"] == "euler"
    assert (
        "flow matching (meanflow.share_r_equals_t=1), whose samples in 3 steps are blurred"
        in (tmp_path / "log").read_text()
    )
    for nfe, expected in ((1, "in 1 step are about the mean image of their class"), (8, None)):
        out = tmp_path / f"log{nfe}"
        command = ["--checkpoint", tmp_path / "run", "--nfe", nfe, "--class", 3, "--out", tmp_path / "grid.png"]
        assert zygote.run(out, command, script=ROOT / "tools/sample.py") == [0]
        assert expected in out.read_text() if expected else "warning" not in out.read_text()


@pytest.mark.dist
@pytest.mark.parametrize(
    "variables", [{}, {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}], ids=["no-key", "no-server"]
)
def test_wandb_falls_back_to_offline(tiny_config, tmp_path, variables):
    env = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"}
    done = run_python(
        "-m",
        "mf_dist.train",
        tiny_config,
        "log.wandb=online",
        "train.total_images=32",
        "log.sample_every_images=0",
        env={**env, "HOME": str(tmp_path), **variables},
    )
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "logging W&B offline" in warnings[0] and "finished at step 2" in done.stdout
    assert len(metrics(tmp_path / "run")) == 1
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
