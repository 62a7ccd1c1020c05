"""Waiting for ranks: what is missing is said, and signals end a process that has not begun."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from mf_dist.runtime import rendezvous
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.launch import LaunchedRank


@pytest.fixture
def port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.05)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def test_rank_0_says_how_many_ranks_are_missing(port, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"waited \d s for 2 of 3 ranks \(WORLD_SIZE=3; .*unset WORLD_SIZE\)"):
        rendezvous.meet(LaunchedRank(0, 3, 0), 0.3)
    assert capsys.readouterr().err.startswith("waiting for 2 of 3 ranks (WORLD_SIZE=3")


def test_other_ranks_wait_for_rank_0(port, capsys):
    with pytest.raises(UserError, match=rf"waited \d s for rank 0 at 127\.0\.0\.1:{port} \(MASTER_ADDR, MASTER_PORT\)"):
        rendezvous.meet(LaunchedRank(1, 2, 1), 0.3)
    assert capsys.readouterr().err.startswith(f"waiting for rank 0 at 127.0.0.1:{port}")


def test_a_port_in_use_is_one_line(port):
    with socket.create_server(("", port)), pytest.raises(UserError, match=rf"cannot use 127\.0\.0\.1:{port} .*in use"):
        rendezvous.meet(LaunchedRank(0, 2, 0), 0.3)


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["train", "fid_eval"])
def test_variables_of_srun_left_in_a_shell(tiny_config, images, port, number, program):
    """The process says what it waits for, and a signal ends it."""
    step = {"STEP_NUM_TASKS": "2", "PROCID": "0", "LOCALID": "0", "JOB_ID": "7", "STEP_ID": "0", "STEP_NODELIST": "n1"}
    env = {**os.environ, **{f"SLURM_{name}": value for name, value in step.items()}}
    features = ROOT / "mf_dist/assets/digits-features"
    command = {
        "train": ["-m", "mf_dist.train", tiny_config],
        "fid_eval": [
            "tools/fid_eval.py",
            "--images",
            images,
            "--features",
            features,
            "--out",
            tiny_config.parent / "o",
            "--reference",
            images,
        ],
    }[program]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("waiting for 1 of 2 ranks (SLURM_STEP_NUM_TASKS=2; "), line + process.stdout.read()
    start = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    expected = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}
    assert process.returncode == expected[number] and "Traceback" not in rest
