"""What the preflight sees on a node, and whom it blames. The all-reduce runs in tests/slurm."""

import json
import shutil

import pytest
import torch
from conftest import run_python

from mf_dist.config import load_config
from mf_dist.durable import write_json
from mf_dist.preflight import check_node, judge


@pytest.fixture
def fresh(tiny_config, latents, tmp_path):
    """The tiny config on a copy of the latents."""
    shutil.copytree(latents, tmp_path / "latents")
    return load_config(str(tiny_config), [f"data.path={tmp_path / 'latents'}"])


def test_a_good_node_has_no_problems(fresh):
    said = check_node(fresh, gpus=0, ranks=2)
    assert said["problems"] == []
    assert said["same"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_missing_gpus_are_named(fresh):
    assert check_node(fresh, gpus=8, ranks=2)["problems"] == ["GPUs: 0 GPUs visible, 8 expected"]


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_shards_that_cannot_be_read_are_named(fresh, tmp_path, fault):
    last = tmp_path / "latents/shard-00002.tar"
    raw = last.read_bytes()
    last.unlink() if fault == "gone" else last.write_bytes(raw[:-1])
    (problem,) = check_node(fresh, gpus=0, ranks=2)["problems"]
    assert problem.startswith("shards: ") and "shard-00002" in problem


def test_a_disk_without_room_is_named(fresh, monkeypatch):
    monkeypatch.setattr("mf_dist.cost.checkpoint_bytes", lambda config: 1 << 60)
    (problem,) = check_node(fresh, gpus=0, ranks=2)["problems"]
    assert problem.startswith("checkpoints: ") and "MiB free" in problem


def node(into, name, problems=(), **same):
    write_json(into / f"{name}.json", {"node": name, "same": {"torch": "2", **same}, "problems": list(problems)})


def test_silent_odd_and_broken_nodes_are_blamed(tmp_path):
    for name in ("n1", "n2", "n3"):
        node(tmp_path, name)
    node(tmp_path, "n4", torch="1")
    node(tmp_path, "n5", ["GPUs: 7 GPUs visible, 8 expected"])
    (tmp_path / "n7.json").write_text("{")
    bad, _ = judge(tmp_path, [f"n{i}" for i in range(1, 8)])
    assert bad == {
        "n4": ["torch is 1, elsewhere 2"],
        "n5": ["GPUs: 7 GPUs visible, 8 expected"],
        "n6": ["it did not answer"],
        "n7": ["it did not answer"],
    }


def test_wires(tmp_path):
    """A node without a word beside others that have one; a wrong sum; and speeds of the slowest."""
    for name, speed, problems in (("n1", 90.0, []), ("n2", 80.0, ["a wrong sum from the all-reduce within a node"])):
        node(tmp_path, name)
        said = {"node": name, "problems": problems, "within a node": {"gb_per_second": speed, "ranks": 8}}
        (tmp_path / f"{name}.wires.json").write_text(json.dumps(said))
    node(tmp_path, "n3")
    bad, lines = judge(tmp_path, ["n1", "n2", "n3"])
    assert bad == {"n2": ["a wrong sum from the all-reduce within a node"], "n3": ["its ranks did not answer"]}
    assert lines == ["all-reduce within a node: 8 ranks, 80.00 GB/s a rank on the slowest node, n2"]


def test_what_all_nodes_have_is_no_nodes_fault(tmp_path):
    node(tmp_path, "n1", ["checkpoints: no room"])
    node(tmp_path, "n2", ["checkpoints: no room"])

    def verdict(*nodes):
        return run_python("-m", "mf_dist.preflight", "judge", "--into", tmp_path, *nodes).stdout.strip()

    assert verdict("n1", "n2") == "failed - on all nodes, n1: checkpoints: no room; n2: checkpoints: no room"
    assert verdict("n1") == "bad n1 n1: checkpoints: no room"
    node(tmp_path, "n2")
    assert verdict("n1", "n2") == "bad n1 n1: checkpoints: no room"
    node(tmp_path, "n1")
    assert verdict("n1", "n2") == "good -"


def test_two_nodes_that_differ_are_both_named(tmp_path):
    """Nobody knows which is right, so none is left out."""
    node(tmp_path, "n1", torch="bad")
    node(tmp_path, "n2")
    bad, _ = judge(tmp_path, ["n1", "n2"])
    assert bad == {"n1": ["torch is bad, and nodes differ"], "n2": ["torch is 2, and nodes differ"]}
