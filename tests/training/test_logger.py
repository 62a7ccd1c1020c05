"""metrics.jsonl after a crash, the status line, and a W&B that is broken."""

import json
import sys
import threading

import pytest

from mf_dist.config.schema import load_config
from mf_dist.training.logger import Logger, _status_line

LINE = {
    "loss": 1.0,
    "raw_loss_r_equals_t": 2.0,
    "raw_loss_r_below_t": None,
    "du_dt_norm": None,
    "grad_norm": 0.5,
    "images_per_second": 640.0,
    "seconds_per_step": 0.1,
    "data_wait_share": 0.03,
    "memory_gib": 1.0,
}


def test_later_and_damaged_lines_are_removed_on_resume(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (10, 20, 30)]
    path.write_text("\n".join([*lines, '{"step": 4', "null", '{"x": 1}']))
    options = ["train.total_images=1050", "train.batch_size=10"]
    logger = Logger(load_config("configs/digits_cpu.yaml", options), tmp_path, step=20, samples_seen=995)
    logger.log({"step": 25, **LINE})
    assert _status_line({"step": 25, **LINE, "images_per_second": 1.4449}, 25).count("1.44 img/s") == 1
    logger.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 25]
    out = capsys.readouterr().out
    assert out.startswith("step 25/25 ") and "raw r=t 2 " in out and "640 img/s" in out and "raw r<t" not in out


HANG = "while not pathlib.Path(__file__).with_name('end').exists(): time.sleep(0.01)"
BROKEN_WANDB = """
import pathlib, sys, time

def act(where):
    if where == {where!r}:
        {how}

act("import")

class Settings:
    def __init__(self, **settings):
        pass

class Image:
    def __init__(self, path):
        act("image")

class Run:
    def log(self, values, step):
        act("log")

    def finish(self):
        act("finish")

def init(**options):
    act("init")
    return Run()

def teardown():
    act("init")
"""
"""A W&B that does `how` in one of its functions."""


@pytest.mark.parametrize(
    ("where", "how", "said"),
    [
        ("import", "raise AttributeError('no GetPrototype')", ["W&B cannot be used (no GetPrototype); continuing"]),
        ("import", "sys.exit(3)", ["W&B cannot be used (SystemExit(3)); continuing"]),
        ("import", "hang", ["W&B cannot be used (no answer after 0"]),
        ("init", "sys.exit()", ["W&B online does not start", "W&B offline does not start"]),
        ("init", "hang", ["W&B online does not start (no answer", "W&B offline does not start (no answer"]),
        ("log", "hang", ["W&B stopped working (no answer"]),
        ("image", "sys.exit(3)", ["W&B stopped working (SystemExit(3))"]),
        ("finish", "hang", ["W&B stopped working (no answer"]),
        ("nowhere", "pass", []),
    ],
)
def test_a_broken_wandb_is_a_warning(tmp_path, monkeypatch, capsys, where, how, said):
    (tmp_path / "wandb.py").write_text(BROKEN_WANDB.format(where=where, how=HANG if how == "hang" else how))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if how == "hang":
        monkeypatch.setattr("mf_dist.training.logger.WANDB_SECONDS", 0.2)
    logger = Logger(load_config("configs/digits_cpu.yaml", ["log.wandb=online"]), tmp_path, step=0, samples_seen=0)
    for step in (1, 2):
        logger.log({"step": step, **LINE})
    logger.log_picture("samples", tmp_path / "x.png", 2)
    logger.close()
    (tmp_path / "end").touch()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join()
    sys.modules.pop("wandb", None)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == len(said) and all(text in line for text, line in zip(said, warnings, strict=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
