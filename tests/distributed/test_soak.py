"""A long run under continual faults: its goodput, and that it ends like an undisturbed run."""

import json

import numpy as np
import pytest
from processes import FULL, largest_difference, losses, status, tensors

pytestmark = [pytest.mark.dist, pytest.mark.alone]
STEPS, EVERY = (2000, 100) if FULL else (240, 60)


@pytest.mark.long
def test_soak(zygote, config, tmp_path):
    """A process or I/O fault about every EVERY steps, a save every 8: goodput = steps kept / steps executed."""
    options = [f"train.total_images={16 * STEPS}", "checkpoint.every_images=128"]
    reference, run, log = tmp_path / "reference", tmp_path / "run", tmp_path / "log"
    assert zygote.run(tmp_path / "reference.log", [config, f"run_dir={reference}", *options]) == [0]
    g, executed, faults = np.random.default_rng(0), 0, []
    for _ in range(5 * STEPS // EVERY):
        begin = valid_step(run)
        step = begin + int(g.integers(EVERY // 2, EVERY * 3 // 2))
        do = str(g.choice(["kill", "exit", "raise", "term", "ENOSPC", "EIO"]))
        where = {"call": "write", "nth": int(g.integers(50))} if do in ("ENOSPC", "EIO") else {"step": step}
        log.unlink(missing_ok=True)
        zygote.run(log, [config, *options], 1, [{"do": do, **where}, {"do": "kill", "step": step}])
        faults.append(do)
        executed += max([step_of(line) for line in log.read_text().splitlines() if line.startswith("step ")]) - begin
        if status(run)["status"] == "finished":
            break
    goodput = STEPS / executed
    print(f"{STEPS} steps, {len(faults)} faults ({', '.join(faults)}), {executed} executed: goodput {goodput:.1%}")
    assert status(run)["status"] == "finished" and len(faults) >= STEPS // EVERY // 2
    assert goodput >= (0.9 if FULL else 0.8)
    assert largest_difference(tensors(run, STEPS), tensors(reference, STEPS)) == 0
    assert losses(run) == losses(reference)
    memory = [json.loads(line)["memory_gib"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    growth = memory[-1] / memory[len(memory) // 4] - 1
    print(f"memory growth over the last three quarters: {growth:.2%}")
    assert growth < 0.01


def valid_step(run):
    folders = sorted((run / "checkpoints").glob("step-*[0-9]")) if run.exists() else []
    return int(folders[-1].name[5:]) if folders else 0


def step_of(line):
    return int(line.split()[1].split("/")[0])
