"""What a run starts from, what may change on resuming, and the tool for checkpoints."""

import json
import os
import shutil
import statistics
import time

import numpy as np
import pytest
from conftest import ROOT, VAE, run_python
from processes import FULL, STEPS, assert_same_end, largest_difference, losses, status, tensors, valid_steps
from safetensors.numpy import load_file, save_file
from test_config import DIGITS, LATENT, WRONG

pytestmark = [pytest.mark.dist, pytest.mark.alone]


def test_a_changed_config_is_reported_and_needs_consent_if_it_matters(zygote, config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert zygote.run(log, [config, "train.total_images=160"]) == [0]
    assert zygote.run(log, [config, "optim.lr=2e-3"]) == [2]
    assert "trained with optim.lr=0.001, now it is 0.002" in log.read_text().splitlines()[-1]
    assert "--allow-config-change" in log.read_text().splitlines()[-1]
    options = ["optim.lr=2e-3", "optim.ema_decay=[0.99, 0.5]", "log.every_steps=5"]
    assert zygote.run(log, [config, *options, "--allow-config-change"]) == [0], log.read_text()
    text = log.read_text()
    for line in (
        "config changed: optim.lr 0.001 -> 0.002",
        "config changed: log.every_steps 1 -> 5",
        "config changed: train.total_images 160 -> 480",
        "ema-0.5 is new: it starts from the weights of step 10",
    ):
        assert line in text
    assert {name.split("/")[0] for name in tensors(run, STEPS)} == {
        "master",
        "exp_avg",
        "exp_avg_sq",
        "ema-0.99",
        "ema-0.5",
    }
    assert zygote.run(log, [config, *options, "--allow-config-change", "model.depth=3"]) == [2]
    assert "choose another run_dir" in log.read_text().splitlines()[-1]


def test_a_changed_batch_size_continues_with_the_next_image_on_any_number_of_ranks(zygote, config, tmp_path):
    """16 images a step to image 160, 24 to image 304, 20 to image 444; the rest is less than a batch of 40."""
    runs = {}
    for ranks, accumulation in ((1, 1), (2, 1), (1, 2)):
        run, log = tmp_path / f"run{ranks}{accumulation}", tmp_path / f"log{ranks}{accumulation}"
        options = [f"run_dir={run}", "checkpoint.keep=9", "checkpoint.keep_every_images=100"]
        for batch, images in ((16, 160), (24, 320), (20, 460), (40, 470)):
            micro_batch = 4 if batch == 20 else batch // ranks // accumulation
            sizes = [f"train.batch_size={batch}", f"train.total_images={images}", f"train.micro_batch={micro_batch}"]
            world = 1 if batch == 20 else ranks
            codes = zygote.run(log, [config, *options, *sizes, "--allow-config-change"], world)
            assert set(codes) == {0}, log.read_text()
        text = log.read_text()
        assert "24 does not divide the 160 images left of train.total_images 320: the last 16 are not trained" in text
        assert "40 does not divide the 26 images left" in text and "finished at step 23 (444 images)" in text
        assert status(run)["samples_seen"] == 444
        runs[ranks, accumulation] = losses(run)
        seen = [*range(16, 161, 16), *range(184, 305, 24), *range(324, 445, 20)]
        assert [line["samples_seen"] for line in losses(run)] == seen
    for line, *others in zip(*runs.values(), strict=True):
        for other in others:
            assert line["raw_loss_r_below_t"] == pytest.approx(other["raw_loss_r_below_t"], rel=1e-4), line["step"]


def test_other_versions_are_a_warning(zygote, config, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    assert zygote.run(log, [config, "train.total_images=160"]) == [0]
    folder = run / "checkpoints/step-00000010"
    state = json.loads((folder / "state.json").read_text())
    assert state["versions"].keys() >= {"python", "torch", "deepspeed", "code", "device", "ranks"}
    assert len(state["versions"]["code"]) == 40 or state["versions"]["code"] == "unknown"
    state["versions"]["torch"] = "1.0"
    raw = json.dumps(state).encode()
    (folder / "state.json").write_bytes(raw)
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert zygote.run(log, [config]) == [0]
    assert "warning: torch was 1.0, now it is 2." in log.read_text()


def test_init_from_a_run_an_exported_file_and_files_that_do_not_fit(zygote, config, tmp_path, whole):
    source, log = whole(1), tmp_path / "log"
    exported = tmp_path / "model.safetensors"
    export = ["export", source, "--out", exported]
    assert zygote.run(tmp_path / "export", export, script=ROOT / "tools/checkpoint.py") == [0]
    assert f"EMA of decay 0.99 of {source}" in (tmp_path / "export").read_text()
    ema = load_file(exported)
    expected = {name.removeprefix("ema-0.99/"): a for name, a in tensors(source, STEPS).items() if "ema-0.99" in name}
    assert largest_difference(ema, expected) == 0
    for number, origin in enumerate((source, exported)):
        run = tmp_path / f"run{number}"
        options = [f"run_dir={run}", f"train.init_from={origin}", "optim.lr=1e-30", "train.total_images=16"]
        assert zygote.run(log, [config, *options]) == [0], log.read_text()
        after = {name[7:]: a for name, a in tensors(run, 1).items() if name.startswith("master/")}
        assert largest_difference(after, ema) == 0 and "initial weights: " in log.read_text()
    save_file({**ema, "patch_in.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    save_file({k: v for k, v in ema.items() if k != "label.weight"}, tmp_path / "less.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in {
        "other.safetensors": "patch_in.weight has shape (2, 2), this network needs (32, 16)",
        "less.safetensors": "label.weight is missing",
        "text.safetensors": "as safetensors",
        "nowhere": "no checkpoint in",
    }.items():
        assert zygote.run(log, [config, f"train.init_from={tmp_path / name}"]) == [2]
        assert message in log.read_text().splitlines()[-1]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_checkpoint_tool(zygote, tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole(1), run)
    checkpoints = run / "checkpoints"

    def tool(*arguments, expect=0):
        log = tmp_path / "tool.log"
        log.unlink(missing_ok=True)
        assert zygote.run(log, arguments, script=ROOT / "tools/checkpoint.py") == [expect], log.read_text()
        return log.read_text()

    listed = tool("ls", run).splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["25", "30"] and "0.9, 0.99" in listed[1]
    assert tool("verify", run).count(": valid") == 2
    assert tool("diff", run, checkpoints / "step-00000030") == "the same\n"
    difference = tool("diff", checkpoints / "step-00000025", run, expect=1)
    assert "step: 25 -> 30" in difference and "tensors differ" in difference
    assert "would delete" in tool("prune", run, "--keep", 1, "--dry-run")
    assert valid_steps(run) == [25, 30]
    path = checkpoints / "step-00000030/master.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "step-00000030: DAMAGED" in tool("verify", run, expect=1)
    (run / "eval").mkdir()
    (run / "eval/metrics.json").write_text('[{"metrics": {"fd": 1}, "nfe": 1, "step": 25, "ema": "0.9"}]')
    assert "no value of that metric for EMA 0.99" in tool("prune", run, "--keep", 1, "--keep-best", "fd", expect=2)
    assert "left alone, DAMAGED" in tool("prune", run, "--keep", 1)
    assert valid_steps(run) == [25], "the only valid one stays"
    for arguments in (
        ["ls", "nowhere"],
        ["prune", run, "--keep", 0],
        ["export", run, "--out", "x.pt"],
        ["export", run, "--out", tmp_path / "m.safetensors", "--ema", "0.1"],
    ):
        assert tool(*arguments, expect=2).splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("moment", ["in a save", "while drawing"])
def test_a_signal_during_other_work_waits_for_the_step_boundary(zygote, whole, config, tmp_path, moment):
    log, run = tmp_path / "log", tmp_path / "run"
    fault = {"do": "term", "io": 40} if moment == "in a save" else {"do": "term", "draws": 1}
    options = [] if moment == "in a save" else ["log.sample_every_images=160"]
    assert zygote.run(log, [config, *options], 1, [fault]) == [0], log.read_text()
    assert status(run)["status"] == "stopped" and valid_steps(run)[-1] == status(run)["step"]
    assert zygote.run(log, [config, *options]) == [0]
    assert_same_end(run, whole(1))


def test_background_saves_are_those_of_a_run_that_waits(zygote, config, tmp_path):
    """Slow fsyncs make training continue during each save; every byte of every checkpoint stays the same."""
    slow = [{"do": "pause", "call": "fsync", "nth": 1, "for": 10_000}]
    for name, faults in (("fast", []), ("slow", slow)):
        options = [f"run_dir={tmp_path / name}", "checkpoint.keep=99"]
        assert zygote.run(tmp_path / name / "log", [config, *options], 2, faults) == [0, 0]
    assert valid_steps(tmp_path / "slow") == valid_steps(tmp_path / "fast") == [5, 10, 15, 20, 25, 30]
    for step in valid_steps(tmp_path / "slow"):
        assert largest_difference(tensors(tmp_path / "slow", step), tensors(tmp_path / "fast", step)) == 0
    lines = (tmp_path / "slow/log").read_text().splitlines()
    between = lines[lines.index(next(line for line in lines if line.startswith("saving step 5"))) + 1 :]
    assert between[0].startswith("step 6/30"), "training must not wait for the disk"


@pytest.mark.parametrize("victim", ["checkpoint", "init_from", "features", "reference", "vae", "latents"])
def test_no_file_runs_code(zygote, whole, config, tmp_path, latents, images, victim):
    """Every place that takes a file gets pickles, in each format that such a file could have."""
    trap, log = tmp_path / "code ran", tmp_path / "log"

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch '{trap}'",)

    files = malicious_files(tmp_path, Trap())[: 4 if FULL or victim in ("checkpoint", "init_from", "latents") else 2]
    for number, path in enumerate(files):
        run = tmp_path / f"run{number}"
        shutil.copytree(whole(1), run)
        trainer = [config, f"run_dir={run}"]
        tool = ["--checkpoint", run, "--nfe", 1, "--num-samples", 12, "--out", tmp_path / "eval"]
        if victim == "checkpoint":
            for file in (run / "checkpoints").rglob("*.safetensors"):
                shutil.copy(path, file)
            assert zygote.run(log, [*trainer, "train.total_images=496"]) == [0]  # from scratch, with a warning
            assert "passed over a damaged checkpoint" in log.read_text()
        elif victim == "init_from":
            shutil.copy(path, tmp_path / "evil.safetensors")
            shutil.rmtree(run)
            for source in (path, tmp_path / "evil.safetensors"):
                assert zygote.run(log, [*trainer, f"train.init_from={source}"]) == [2]
        elif victim in ("features", "vae"):
            folder = tmp_path / f"{victim}{number}"
            shutil.copytree(VAE if victim == "vae" else VAE.parent / "digits-features", folder)
            for file in folder.glob("*.safetensors"):
                shutil.copy(path, file)
                shutil.copy(path, file.with_suffix(".bin"))
            assert zygote.run(log, [*tool, f"--{victim}", folder], script=ROOT / "tools/fid_eval.py") == [2]
        elif victim == "reference":
            shutil.copy(path, tmp_path / "evil.npz")
            command = [*tool, "--reference", tmp_path / "evil.npz"]
            assert zygote.run(log, command, script=ROOT / "tools/fid_eval.py") == [2]
        else:
            folder = tmp_path / f"latents{number}"
            shutil.copytree(latents, folder)
            for file in folder.glob("*.tar"):
                shutil.copy(path, file)
            assert zygote.run(log, [*trainer, f"data.path={folder}", "--allow-config-change"]) == [2]
        assert not trap.exists(), f"{victim} ran code from {path.name}"


def malicious_files(folder, trap):
    import io
    import pickle
    import tarfile

    import torch

    plain = folder / "evil.pkl"
    plain.write_bytes(pickle.dumps(trap))
    torch.save({"a": trap}, folder / "evil.pt")
    np.savez(folder / "evil_object.npz", mu=np.array([trap], dtype=object), sigma=np.array([trap], dtype=object))
    with tarfile.open(folder / "evil.tar", "w") as archive:
        for name in ("0000.moments.npy", "0000.pyd", "../escape.npy"):
            raw = io.BytesIO(plain.read_bytes())
            member = tarfile.TarInfo(name)
            member.size = len(raw.getvalue())
            archive.addfile(member, raw)
    return [plain, folder / "evil.pt", folder / "evil_object.npz", folder / "evil.tar"]


COMMAND_LINES = [
    ["-m", "mf_dist.train", "configs/none.yaml"],
    ["-m", "mf_dist.train", DIGITS, "train"],
    ["tools/fid_eval.py", "--nfe", "0"],
    ["tools/fid_eval.py", "--checkpoint", "nowhere"],
    ["tools/fid_eval.py", "--images", "x"],
    ["tools/fid_eval.py", "--times", "1,0.5"],
    ["tools/reference_stats.py", "--images", "x", "--out", "x.npy"],
    ["tools/bench/bench_degradations.py", "--images", "x", "--count", "1"],
    ["tools/bench/bench_metrics.py", "--count", "1"],
    ["tools/sample.py", "--out", "grid.xyz"],
    ["tools/sample.py", "--checkpoint", "nowhere"],
    ["tools/encode_latents.py", "--images", "x", "--out", "o", "--vae", "v", "--resolution", "0"],
    ["tools/encode_latents.py", "--images", "nowhere", "--out", "o", "--vae", "v", "--resolution", "256"],
    ["tools/checkpoint.py", "ls", "nowhere"],
    ["tools/checkpoint.py", "verify", "nowhere"],
    ["tools/checkpoint.py", "prune", "nowhere", "--keep", "0"],
    ["tools/bench/bench_step.py", "--batch", "3"],
    ["tools/bench/bench_step.py", "--variants", "mine"],
    ["tools/bench/bench_precision.py", "--checkpoint", "nowhere", "--batches", "0"],
    ["tools/bench/bench_attention.py", "--tokens", "many"],
    ["tools/demo/write_digits.py", "--out", "README.md/x"],
]
ALSO_WRONG = [
    ["checkpoint.keep=0"],
    ["checkpoint.every_images=0"],
    ["train.max_skipped=0"],
    ["optim.ema_decay=[]"],
    ["optim.ema_decay=[0.9, 0.9]"],
    ["optim.spike_action=shout"],
    ["train.hang_seconds=0"],
]


def test_sixty_mistakes_are_one_line_each_without_delay(tmp_path):
    train = ["-m", "mf_dist.train", DIGITS, *LATENT, f"run_dir={tmp_path / 'run'}"]
    overrides = [wrong for wrong, _ in WRONG] + ALSO_WRONG
    commands = [[*train, *wrong] for wrong in overrides] + COMMAND_LINES
    assert len(commands) >= 60
    seconds = []
    for command in commands:
        start = time.perf_counter()
        done = run_python(*command, expect=2)
        seconds.append(time.perf_counter() - start)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: "), command
    assert statistics.median(seconds) < 2, "none of them may wait for torch"


def test_out_of_memory_says_what_to_change(zygote, config, tmp_path):
    """The real exception class, raised in a step."""
    log = tmp_path / "log"
    assert zygote.run(log, [config], 1, [{"do": "memory", "step": 3}]) == [2]
    line = log.read_text().splitlines()[-1]
    assert line.startswith("error: out of GPU memory in step 3, peak") and "train.micro_batch=8" in line
    assert "engine.checkpoint_activations=true, or engine.zero_stage=2" in line
    assert status(tmp_path / "run")["status"] == "failed" and losses(tmp_path / "run")[-1]["step"] == 2
