"""tools/import_weights.py: from another project's file to samples; a wrong file leaves nothing."""

import argparse
import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, VAE
from safetensors.torch import load_file, save_file
from test_documents import program

from mf_dist.checkpoint.reader import find_checkpoint
from mf_dist.sampling.generator import load_trained_model

TOOL = ROOT / "tools/import_weights.py"


def velocity(project):
    """Weights in the project's layout whose network gives a multiple of LayerNorm(z): near a velocity at t = 1."""
    golden = load_file(ROOT / "tests/sampling/sit_golden.safetensors")
    prefix = f"{project}/weights/"
    own = {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}
    weights = {name: tensor if name == "pos_embed" else 0 * tensor for name, tensor in own.items()}
    weights["x_embedder.proj.weight"] = 10 * torch.eye(16).view(16, 2, 2, 4).permute(0, 3, 1, 2).contiguous()
    out = torch.eye(16).view(4, 4, 16)
    out = torch.cat([-out, 7 + out], dim=1) if project == "sit" else out
    return {**weights, "final_layer.linear.weight": out.flatten(0, 1).contiguous()}


def trained_with(**said):
    """What SiT's training script saves, REPA's too."""
    ema = velocity("sit")
    return {"model": {name: 0 * a for name, a in ema.items()}, "ema": ema, "opt": {"state": {}}} | {
        "args": argparse.Namespace(**said)
    }


@pytest.fixture
def run_tool(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["import_weights.py", *map(str, arguments)])
        code = program(TOOL).main()
        return code, capsys.readouterr()

    return run


def test_a_training_checkpoint_becomes_a_model_that_is_sampled_in_euler_steps(run_tool, tmp_path):
    torch.save(trained_with(path_type="Linear", prediction="velocity"), tmp_path / "0050000.pt")
    shutil.copytree(VAE, tmp_path / "vae")
    config = json.loads((VAE / "config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    options = ("--from", "sit", "--num-heads", 2, "--vae", tmp_path / "vae")
    code, printed = run_tool(tmp_path / "0050000.pt", *options, "--out", tmp_path / "model")
    assert code == 0 and "left out: final_layer.linear: the second half of its channels" in printed.out
    checkpoint = find_checkpoint(tmp_path / "model")
    trained = load_trained_model(checkpoint, None, None, torch.device("cpu"))
    generator = trained.generator
    assert generator.is_flow and generator.sampler == "euler" and trained.config.eval.nfe == (50,)
    assert "flow matching" in generator.warning_of_few_steps(1) and generator.num_classes == 5
    images = generator(*generator.draw(range(2), "random", 0, 1), [1.0, 0.5, 0.0])
    assert images.shape == (2, 3, 32, 32) and images.std() > 1
    assert "share_r_equals_t" not in (tmp_path / "model/README.md").read_text()
    assert checkpoint.state["imported"]["file"] == "0050000.pt"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_bare_weights_in_each_format(run_tool, tmp_path, prefix):
    weights = {prefix + name: tensor for name, tensor in velocity("repa").items()}
    save_file(weights, tmp_path / "flow.safetensors")
    torch.save(weights, tmp_path / "flow.pt")
    models = []
    for path in (tmp_path / "flow.safetensors", tmp_path / "flow.pt"):
        out = tmp_path / f"model{path.suffix}.d"
        code, printed = run_tool(path, "--from", "repa", "--num-heads", 2, "--out", out)
        assert code == 0 and "left out: projectors.0.0.bias, " in printed.out
        models.append(load_file(out / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


class Trap:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['TRAP']}",)


def reverse(weights):
    return {**weights, "final_layer.linear.weight": -weights["final_layer.linear.weight"]}


WRONG = {
    "another path": ("sit", lambda: trained_with(path_type="VP"), "trained with path_type=VP; only linear"),
    "noise": ("sit", lambda: trained_with(prediction="noise"), "trained with prediction=noise; only velocity"),
    "noise, unsaid": ("sit", lambda: reverse(velocity("sit")), "predicts noise: not supported"),
    "NaN": ("sit", lambda: {**velocity("sit"), "t_embedder.mlp.0.bias": torch.full((16,), np.nan)}, "is not finite"),
    "misshapen": ("sit", lambda: {**velocity("sit"), "blocks.1.mlp.fc1.bias": torch.ones(3)}, "has shape (3,)"),
    "another project": ("repa", lambda: {"net.weight": torch.ones(2)}, "x_embedder.proj.weight is missing"),
    "no weights": ("sit", lambda: {"epoch": 3}, "'epoch' is no tensor"),
    "one tensor": ("sit", lambda: torch.ones(3), "holds no weights by name"),
    "code": ("sit", lambda: {**velocity("sit"), "x": Trap()}, "its pickle names code, which is not run"),
    "DMF": ("dmf", lambda: velocity("repa"), "cannot represent them"),
}


@pytest.mark.parametrize(("project", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line_and_leaves_nothing(run_tool, tmp_path, monkeypatch, project, content, message):
    monkeypatch.setenv("TRAP", str(tmp_path / "code ran"))
    path = tmp_path / "weights.pt"
    torch.save(content(), path)
    code, printed = run_tool(path, "--from", project, "--num-heads", 2, "--out", tmp_path / "model")
    assert code == 2 and printed.err.count("\n") == 1 and printed.err.startswith("error: ") and message in printed.err
    assert [*tmp_path.iterdir()] == [path]


def test_damaged_files_and_places_in_use(run_tool, tmp_path):
    torch.save(velocity("sit"), tmp_path / "whole.pt")
    save_file(velocity("sit"), tmp_path / "whole.safetensors")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine").write_text("")
    for name in ("whole.pt", "whole.safetensors"):
        raw = (tmp_path / name).read_bytes()
        for part in (b"", b"no weights\n", raw[: len(raw) // 2], raw[:-1]):
            (tmp_path / f"part_{name}").write_bytes(part)
            code, printed = run_tool(tmp_path / f"part_{name}", "--from", "sit", "--out", tmp_path / "model")
            assert code == 2 and printed.err.count("\n") == 1 and f"cannot read {tmp_path}/part_{name}" in printed.err
    for path, out, message in (
        ("absent.pt", "model", "No such file"),
        ("whole.pt", "used", "is no empty folder"),
        ("whole.pt", "whole.safetensors", "is no empty folder"),
        ("whole.pt", "model", "give --num-heads"),
    ):
        code, printed = run_tool(tmp_path / path, "--from", "sit", "--out", tmp_path / out)
        assert code == 2 and message in printed.err and not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def imf_file(tmp_path_factory):
    """Weights in the layout of iMF's authors, of a network near a velocity at t = 1, for sampling: without a v head but
    for its last layer."""
    golden = load_file(ROOT / "tests/models/imf_reference.safetensors")
    weights = {name.removeprefix("weight:"): a for name, a in golden.items() if name.startswith("weight:v_final")}
    for name, tensor in golden.items():
        if name.startswith("weight:") and not name.startswith("weight:v_"):
            weights[name.removeprefix("weight:")] = 0 * tensor if "_scale" in name else tensor
    width = len(weights["x_embedder.proj.bias"])
    weights["x_embedder.proj.weight"] = torch.eye(width)[:, :16].view(width, 2, 2, 4).permute(0, 3, 1, 2).contiguous()
    weights["x_embedder.proj.bias"] = torch.zeros(width)
    weights["u_final_layer.norm.weight"] = torch.ones(width)
    weights["u_final_layer.linear._flax_linear.weight"] = torch.eye(width)[:16].contiguous()
    path = tmp_path_factory.mktemp("imf") / "iMF-tiny.pth"
    torch.save({f"net.{name}": tensor.float() for name, tensor in weights.items()}, path)
    return path


def test_the_authors_imf_is_sampled_with_guidance_and_their_normalisation(run_tool, imf_file, tmp_path):
    shutil.copytree(VAE, tmp_path / "vae")
    config = json.loads((VAE / "config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    code, printed = run_tool(imf_file, "--from", "imf", "--vae", tmp_path / "vae", "--out", tmp_path / "model")
    assert code == 0 and "left out: v_final_layer.linear._flax_linear.bias" in printed.out, printed
    trained = load_trained_model(find_checkpoint(tmp_path / "model"), None, None, torch.device("cpu"), guidance=3.0)
    generator, model = trained.generator, trained.config.model
    assert (model.network, model.depth, model.imf_dit.head_depth, model.latent_size) == ("imf_dit", 3, 1, 32)
    assert generator.protocol == {"sampler": "meanflow", "guidance": 3.0, "interval": [0.0, 1.0]}
    assert trained.config.data.normalisation_mean[0] == 0.86488 and generator.normalisation.scale[0] == 1 / 4.85503674
    images = generator(*generator.draw(range(2), "balanced", 0, 1), [1.0, 0.0])
    assert images.shape == (2, 3, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omega_tokens": torch.tensor(1.0)}, "omega_tokens has shape ()"),
        ({"shared_blocks.0.attn.q_norm.weight": torch.ones(50)}, "has shape (10,), this network needs (20,)"),
        ({"shared_blocks.0": "shared_blocks.7"}, "it has no shared_blocks.0"),
    ],
    ids=["a number", "a head wider than the network", "blocks from 7 on"],
)
def test_a_misshapen_imf_is_one_line(run_tool, imf_file, tmp_path, change, message):
    (key, value), weights = *change.items(), torch.load(imf_file, weights_only=True)
    if isinstance(value, str):
        weights = {name.replace(key, value): tensor for name, tensor in weights.items()}
    else:
        weights[f"net.{key}"] = value
    torch.save(weights, tmp_path / "weights.pth")
    code, printed = run_tool(tmp_path / "weights.pth", "--from", "imf", "--out", tmp_path / "model")
    assert code == 2 and printed.err.count("\n") == 1 and message in printed.err, printed.err
    assert not (tmp_path / "model").exists()


def test_heads_are_given_only_where_no_tensor_tells_them(run_tool, imf_file, tmp_path):
    code, printed = run_tool(imf_file, "--from", "imf", "--num-heads", 2, "--out", tmp_path / "model")
    assert code == 2 and "--num-heads is for sit and repa" in printed.err


def test_a_run_starts_from_the_authors_imf_with_a_new_v_head(run_tool, imf_file, tmp_path):
    from mf_dist.config.loader import from_tree
    from mf_dist.config.schema import Config
    from mf_dist.sampling.generator import build_network
    from mf_dist.training.initial_weights import load_initial_weights

    assert run_tool(imf_file, "--from", "imf", "--out", tmp_path / "model")[0] == 0
    config = from_tree(Config, find_checkpoint(tmp_path / "model").state["config"], "state")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "model")))
    net = build_network(config.model, 1)
    lines = load_initial_weights(net, config, [])
    assert lines[1] == "initial weights: the source has no v head, which starts as a copy of the u head"
    assert "the source's 3 classes are kept by number" in lines[2] and len(lines) == 3
    assert torch.equal(net.v_blocks[0].attention.qkv.weight, net.u_blocks[0].attention.qkv.weight)
    assert torch.equal(net.v_patch_out.weight, net.patch_out.weight)
