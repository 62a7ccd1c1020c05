"""The evaluation by several processes, killed and resumed; in training; and Inception against other packages' code."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEATURES, ROOT
from processes import FULL, status, valid_steps

pytestmark = [pytest.mark.dist, pytest.mark.alone]
TOOL = ROOT / "tools/fid_eval.py"
COUNT = 46
"""Samples: 12 blocks of 4, the last one not full."""


@pytest.fixture(scope="module")
def evaluate(zygote, whole):
    """evaluate(out, *options, ranks, faults) -> exit codes of the tool on a trained run."""

    def run(out, *options, ranks=1, faults=()):
        command = ["--checkpoint", whole(1), "--nfe", 1, "--num-samples", COUNT, "--block", 4, "--out", out, *options]
        return zygote.run(out.with_suffix(".log"), command, ranks, faults, script=TOOL)

    return run


def entries(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def exact(evaluate, tmp_path_factory):
    """The entry of one undisturbed process, and its samples."""
    out = tmp_path_factory.mktemp("exact") / "out"
    assert evaluate(out, "--save-npz") == [0], out.with_suffix(".log").read_text()
    return entries(out)[0], np.load(out / "samples_nfe1.npz")


@pytest.mark.parametrize("ranks", [2, 4])
def test_exact_numbers_are_the_same_to_the_last_bit_on_any_number_of_processes(evaluate, exact, tmp_path, ranks):
    assert evaluate(tmp_path / "out", ranks=ranks) == [0] * ranks, (tmp_path / "out.log").read_text()
    (entry,) = entries(tmp_path / "out")
    assert entry["ranks"] == ranks and entry["pixels_sha256"] == exact[0]["pixels_sha256"]
    assert entry["metrics"] == exact[0]["metrics"] and len(entry["metrics"]) == 7


@pytest.mark.parametrize("ranks", [1, 2])
def test_streaming_numbers_agree(evaluate, exact, tmp_path, ranks):
    """80 samples, more than features, so that sums are taken and reduced."""
    values = {}
    for mode in ("exact", "streaming"):
        options = ["--num-samples", 80, "--statistics", mode, "--metrics", "fid"]
        assert evaluate(tmp_path / mode, *options, ranks=ranks) == [0] * ranks
        values[mode] = entries(tmp_path / mode)[0]["metrics"]["fd_digits_80"]
    assert values["streaming"] == pytest.approx(values["exact"], rel=1e-9)


def test_another_block_size_has_the_same_images_within_one_level(evaluate, exact, tmp_path):
    assert evaluate(tmp_path / "out", "--block", 7, "--save-npz", "--metrics", "fid") == [0]
    with np.load(tmp_path / "out/samples_nfe1.npz") as other:
        assert np.array_equal(other["arr_1"], exact[1]["arr_1"])
        difference = np.abs(other["arr_0"].astype(int) - exact[1]["arr_0"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_killed_repeatedly_it_ends_with_the_same_numbers(evaluate, exact, tmp_path):
    """kill -9 of a process while it writes a block's file, each time on another number of processes."""
    out, draws, made = tmp_path / "out", random.Random(0), []
    kills = 20 if FULL else 2
    for trial in range(kills):
        ranks = draws.choice([1, 2, 4])
        # 38 blocks of the reference are made first, then 12 of samples
        fault = {"do": "kill", "block": draws.randrange(1, 9), "rank": draws.randrange(ranks)}
        codes = evaluate(out, ranks=ranks, faults=[fault])
        assert -9 in codes or codes == [0] * ranks, (trial, codes)
        if codes == [0] * ranks:  # so many blocks existed that this rank never wrote that one
            assert entries(out)[0]["metrics"] == exact[0]["metrics"]
            (out / "metrics.json").unlink()
        made.append(len(list(out.glob("work/*/block-*.npz"))))
    assert max(made) > 0
    assert evaluate(out) == [0]
    assert entries(out)[0]["metrics"] == exact[0]["metrics"] and not (out / "work").exists()
    print(f"{kills} kills; whole blocks after each: {made}")


def test_measuring_during_training_agrees_with_measuring_afterwards(zygote, config, images, tmp_path):
    """On two ranks in training against one process on the checkpoint; and the best checkpoint stays."""
    stats = tmp_path / "stats.npz"
    command = ["--images", images, "--features", FEATURES, "--out", stats]
    assert zygote.run(tmp_path / "stats.log", command, script=ROOT / "tools/reference_stats.py") == [0]
    options = [
        "train.total_images=320",
        "eval.every_images=80",
        "eval.training_samples=130",
        f"eval.reference={stats}",
        "eval.training_emas=[0.9]",
        "checkpoint.keep=1",
        "checkpoint.keep_best=fd_digits_130",
        "checkpoint.every_images=320",
    ]
    assert zygote.run(tmp_path / "log", [config, *options], 2) == [0, 0], (tmp_path / "log").read_text()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line for line in lines if "fd_digits_130/nfe1/ema0.9" in line}
    assert [*curve] == [5, 10, 15, 20] and all("fd_digits_130/nfe2/ema0.9" in line for line in curve.values())
    best = min((5, 10, 15), key=lambda step: curve[step]["fd_digits_130/nfe1/ema0.9"])  # when step 20 was saved
    assert valid_steps(run) == [best, 20] and status(run)["status"] == "finished"
    command = [
        "--checkpoint",
        run / "checkpoints/step-00000020",
        "--nfe",
        1,
        "--ema",
        0.9,
        "--seed",
        1000,
        "--metrics",
        "fid",
        "--num-samples",
        130,
        "--statistics",
        "streaming",
        "--out",
        tmp_path / "after",
    ]
    assert zygote.run(tmp_path / "after.log", command, script=TOOL) == [0], (tmp_path / "after.log").read_text()
    after = entries(tmp_path / "after")[0]["metrics"]["fd_digits_130"]
    assert after == pytest.approx(curve[20]["fd_digits_130/nfe1/ema0.9"], rel=1e-9)
    inside = [e for e in entries(run / "eval") if e["step"] == 20 and e["nfe"] == 1]
    bands = [entry["plus_minus_95"]["fd_digits_130"] for entry in (entries(tmp_path / "after")[0], *inside)]
    assert bands[0] == pytest.approx(bands[1], rel=1e-6) and 0 < bands[0] < after
    assert [e["metrics"]["fd_digits_130"] for e in inside] == [curve[20]["fd_digits_130/nfe1/ema0.9"]]
    assert inside[0]["seconds"].keys() == {"sample", "decode", "features", "statistics", "all"}
    assert curve[20]["evaluation_seconds"] > inside[0]["seconds"]["all"] > inside[0]["seconds"]["sample"] > 0
    assert inside[0]["warnings"] == [] and inside[0]["reference_made"]["count"] == 150


def test_a_mistake_that_one_rank_finds_is_one_line_for_all(evaluate, zygote, config, images, tmp_path):
    """Before the work, during it and after it: no rank is left waiting, and there is no stack trace."""
    mixed = shutil.copytree(images, tmp_path / "mixed")
    bad = sorted(mixed.rglob("*.png"))[60]  # in the second block, hence rank 1's
    bad.write_bytes(bad.read_bytes()[:100])
    (tmp_path / "late").mkdir()
    (tmp_path / "late/metrics.json").write_text("{")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    folder = ["--images", mixed, "--features", FEATURES, "--reference", images, "--out", tmp_path / "early"]
    assert zygote.run(tmp_path / "early.log", folder, 2, script=TOOL) == [2, 2]
    for name, *options in (
        ("kind", "--metrics", "sfid"),
        ("late", "--metrics", "fid"),
        ("wrong", "--reference", tmp_path / "broken.npz"),
        ("both", "--inception-weights", "weights.pth"),
    ):
        assert evaluate(tmp_path / name, *options, ranks=2) == [2, 2]
    assert zygote.run(tmp_path / "images.log", [config, "eval.every_images=80"], 2) == [2, 2]
    assert "cannot read reference statistics" in status(tmp_path / "run")["reason"]
    sampling = [config, "eval.vae=nowhere", "log.sample_every_images=80"]
    assert zygote.run(tmp_path / "vae.log", sampling, 2) == [2, 2]
    for name, text in {
        "early": f"{bad.name}.*found by rank 1",
        "kind": "no spatial part",
        "late": "late/metrics.json is damaged",
        "wrong": "cannot read reference statistics",
        "vae": "no VAE folder at 'nowhere'",
        "images": "cannot read .*digits.* as written by tools/reference_stats.py",
        "both": "--inception-weights belongs to --features inception",
    }.items():
        log = (tmp_path / f"{name}.log").read_text()
        (line,) = [line for line in log.splitlines() if "error" in line.lower()]
        assert re.match(f"error: .*{text}", line) and "Traceback" not in log, log


def test_ranks_wait_for_work_without_a_limit(zygote, whole, exact, config, tmp_path):
    """Rank 0's distance, its search for a checkpoint and its drawing take twice the time limit of a collective, in
    which a rank is not waited for longer."""
    script, out = Path(__file__).with_name("worker_waiting.py"), tmp_path / "out"
    command = ["--checkpoint", whole(1), "--nfe", 1, "--num-samples", COUNT, "--block", 4, "--out", out]
    assert zygote.run(tmp_path / "log", command, 2, script=script) == [0, 0], (tmp_path / "log").read_text()
    assert entries(out)[0]["metrics"] == exact[0]["metrics"]
    training = ["train", config, "train.total_images=32", "log.sample_every_images=32"]
    assert zygote.run(tmp_path / "train.log", training, 2, script=script) == [0, 0], (
        tmp_path / "train.log"
    ).read_text()
    assert list((tmp_path / "run/samples").glob("*.png"))
    assert zygote.run(tmp_path / "alone.log", ["alone"], 2, script=script)[0] == 1
    assert "2000ms" in (tmp_path / "alone.log").read_text()


def test_inception_is_that_of_torch_fidelity_and_of_pytorch_fid(tmp_path, monkeypatch):
    """The same random weights in their own code: features, logits, the resize; and distances."""
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    from mf_dist.evaluation.inception import open_inception
    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    torch.set_num_threads(2)
    ours = open_inception("inception-random", None, torch.device("cpu"))
    state = ours.graph.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    assert open_inception("inception-other", str(tmp_path / "weights.pth"), torch.device("cpu")).name.startswith(
        "inception_"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 24, 24)).astype(np.uint8).repeat(4, 2).repeat(4, 3)
    found = ours(pixels)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth"))
    pooled, logits = theirs(torch.from_numpy(pixels))
    scale = np.abs(pooled.numpy()).max()
    assert scale > 0.1 and np.abs(found.pooled - pooled.numpy()).max() <= 1e-4 * min(1, scale)
    assert np.abs(found.logits - logits.numpy()).max() <= 1e-4 * np.abs(logits.numpy()).max()
    spatial = ours.graph.Mixed_6d.branch1x1  # row, column, channel: the value at (2, 5) of channel 3
    seen = []
    spatial.register_forward_hook(lambda m, i, out: seen.append(out))
    ours(pixels[:1])
    assert found.spatial.shape == (4, 2023)
    assert found.spatial[0, (2 * 17 + 5) * 7 + 3] == pytest.approx(seen[0][0, 3, 2, 5].item(), rel=1e-4)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state)
    peer = pytorch_fid.inception.InceptionV3([3], resize_input=False).eval()
    whole = np.random.default_rng(1).integers(0, 256, (2, 3, 299, 299)).astype(np.uint8)  # nothing is resized
    with torch.no_grad():  # it computes 2 x - 1, the graph (pixel - 128) / 128
        other = peer(torch.from_numpy(whole).float() / 256)[0].flatten(1).numpy()
    mine = ours(whole).pooled
    assert np.abs(mine - other).max() <= 1e-4 * min(1, np.abs(other).max())
    # as rows of 32 numbers the features have full rank; as they are, those of 4 images do not
    full = found.pooled.reshape(-1, 32), np.concatenate([mine, other]).reshape(-1, 32)
    few = found.pooled[:, :128], np.concatenate([mine, other])[:, :128]
    for rows in (full, few):
        a, b = (exact_gaussian([part], part.shape[1]) for part in rows)
        assert (np.linalg.matrix_rank(a.covariance) == 32) == (rows is full)
        distance = frechet_distance(a, b)
        pair = ({"mu": g.mean, "sigma": g.covariance} for g in (a, b))
        assert distance == pytest.approx(fid_statistics_to_metric(*pair, False)["frechet_inception_distance"], rel=1e-6)
        score = pytorch_fid.fid_score.calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        print(f"distance {distance:.9g}, off pytorch-fid's by {score / distance - 1:.1e}")
        assert distance == pytest.approx(score, rel=1e-6)
