"""What the preflight sees on a node, and whom it blames. The all-reduce runs in tests/slurm."""

import json
import shutil

import pytest
import torch
from conftest import run_python

from mf_dist.config.schema import load_config
from mf_dist.jobs.preflight import check_node, judge
from mf_dist.runtime.atomic_files import write_json


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
    monkeypatch.setattr("mf_dist.config.cost.checkpoint_bytes", lambda config: 1 << 60)
    (problem,) = check_node(fresh, gpus=0, ranks=2)["problems"]
    assert problem.startswith("checkpoints: ") and "MiB free" in problem


def node(into, name, problems=(), has_data=True, **same):
    said = {"node": name, "same": {"torch": "2", **same}, "problems": list(problems), "has_data": has_data}
    write_json(into / f"{name}.json", said)


def verdict(into, *nodes, reason=""):
    options = ["--into", into, "--reason", reason]
    return run_python("-m", "mf_dist.jobs.preflight", "judge", *options, *nodes).stdout.strip()


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


def test_network(tmp_path):
    """A node without a word beside others that have one; a wrong sum; and speeds of the slowest."""
    for name, speed, problems in (("n1", 90.0, []), ("n2", 80.0, ["a wrong sum from the all-reduce within a node"])):
        node(tmp_path, name)
        said = {"node": name, "problems": problems, "within a node": {"gb_per_second": speed, "ranks": 8}}
        (tmp_path / f"{name}.network.json").write_text(json.dumps(said))
    node(tmp_path, "n3")
    bad, lines = judge(tmp_path, ["n1", "n2", "n3"])
    assert bad == {"n2": ["a wrong sum from the all-reduce within a node"], "n3": ["its ranks did not answer"]}
    assert lines == ["all-reduce within a node: 8 ranks, 80.00 GB/s a rank on the slowest node, n2"]


def test_a_wrong_sum_over_all_nodes_blames_none_before_the_pairs(tmp_path):
    """All of them see it. With two nodes in each pair, the one that fails in both of its own is found."""
    nodes = ["n1", "n2", "n3"]
    for name in nodes:
        node(tmp_path, name)
        over_all = {"gb_per_second": 1.0, "ranks": 6, "is_right": False}
        write_json(tmp_path / f"{name}.network.json", {"node": name, "problems": [], "over all nodes": over_all})
    assert verdict(tmp_path, *nodes) == "failed - a wrong sum from the all-reduce over all nodes"
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n1")):
        pair(tmp_path, first, second, works=True)
        if "n2" in (first, second):
            for name in (first, second):
                said = {"node": name, "problems": [], "over all nodes": over_all}
                write_json(tmp_path / "pairs" / f"{first}+{second}" / f"{name}.network.json", said)
    assert verdict(tmp_path, *nodes) == "bad n2 n2: the all-reduce with either neighbour fails"


def test_what_all_nodes_have_is_no_nodes_fault(tmp_path):
    node(tmp_path, "n1", ["checkpoints: no room"])
    node(tmp_path, "n2", ["checkpoints: no room"])
    said = "failed - on all nodes, n1: checkpoints: no room; n2: checkpoints: no room"
    assert verdict(tmp_path, "n1", "n2") == said
    assert verdict(tmp_path, "n1") == "bad n1 n1: checkpoints: no room"
    node(tmp_path, "n2")
    assert verdict(tmp_path, "n1", "n2") == "bad n1 n1: checkpoints: no room"
    node(tmp_path, "n1")
    assert verdict(tmp_path, "n1", "n2") == "good -"


def test_data_that_no_node_has_are_a_mistake(tmp_path):
    """On a single node, or on one of two, they may be that node's missing disk."""
    why = "shards: no finished dataset at 'data'"
    node(tmp_path, "n1", [why], has_data=False)
    node(tmp_path, "n2", [why], has_data=False)
    assert verdict(tmp_path, "n1", "n2") == f"refused - on all nodes, {why}"
    assert verdict(tmp_path, "n1") == f"bad n1 n1: {why}"
    node(tmp_path, "n2")
    assert verdict(tmp_path, "n1", "n2") == f"bad n1 n1: {why}"


def pair(into, first, second, works):
    """What the two leave: words of each at the end, or of the all-reduce within each alone."""
    for name in (first, second):
        said = {"node": name, "problems": [], "within a node": {}} | (
            {"over all nodes": {"is_right": True}} if works else {}
        )
        folder = into / "pairs" / f"{first}+{second}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.network.json", said)


def test_a_node_that_fails_with_both_neighbours_is_to_blame(tmp_path):
    nodes = ["n1", "n2", "n3", "n4"]
    for name in nodes:
        node(tmp_path, name)
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n4"), ("n4", "n1")):
        pair(tmp_path, first, second, works=second != "n1" and first != "n1")
    said = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    assert said == "bad n1 n1: the all-reduce with either neighbour fails"
    pair(tmp_path, "n4", "n1", works=True)  # of n1 and n2 either may be to blame, or the cable between them
    said = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    why = "which node is to blame cannot be told: of the pairs"
    assert said == f"failed - the all-reduce failed; {why} n1+n2 failed"
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n4"), ("n4", "n1")):
        pair(tmp_path, first, second, works=True)
    assert verdict(tmp_path, *nodes, reason="the all-reduce failed").endswith(f"{why} none failed")
    shutil.rmtree(tmp_path / "pairs")
    (tmp_path / "pairs").mkdir()
    said = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    assert said.endswith("n1+n2, n2+n3, n3+n4, n4+n1 failed") and said.startswith("failed - ")


def test_the_place_for_staged_shards_is_looked_at(tiny_config, tmp_path):
    """Its room is looked at in tests/slurm, on a small disk."""
    config = load_config(str(tiny_config), ["data.stage=dir", f"data.stage_dir={tmp_path}/scratch"])
    assert check_node(config, gpus=0, ranks=2)["problems"] == []
    (tmp_path / "scratch").rmdir()
    (tmp_path / "scratch").touch()
    (problem,) = check_node(config, gpus=0, ranks=2)["problems"]
    assert problem.startswith("staging: ") and f"{tmp_path}/scratch" in problem


def test_two_nodes_that_differ_are_both_named(tmp_path):
    """Nobody knows which is right, so none is left out."""
    node(tmp_path, "n1", torch="bad")
    node(tmp_path, "n2")
    bad, _ = judge(tmp_path, ["n1", "n2"])
    assert bad == {"n1": ["torch is bad, and nodes differ"], "n2": ["torch is 2, and nodes differ"]}
