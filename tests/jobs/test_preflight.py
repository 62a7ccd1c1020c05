"""What the preflight finds on a node, and which nodes it blames. The all-reduce runs in tests/slurm."""

import json
import shutil

import pytest
import torch
from conftest import run_python

from mf_dist.config.schema import load_config
from mf_dist.jobs.preflight import check_node, judge
from mf_dist.runtime.atomic_files import write_json


@pytest.fixture
def copied_config(tiny_config, latents, tmp_path):
    """The tiny config on a copy of the latents."""
    shutil.copytree(latents, tmp_path / "latents")
    return load_config(str(tiny_config), [f"data.path={tmp_path / 'latents'}"])


def test_a_good_node_has_no_problems(copied_config):
    result = check_node(copied_config, gpus=0, ranks=2)
    assert result["problems"] == []
    assert result["same"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_missing_gpus_are_named(copied_config):
    assert check_node(copied_config, gpus=8, ranks=2)["problems"] == ["GPUs: 0 GPUs visible, 8 expected"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_gpus_that_torch_cannot_use_are_named(copied_config, monkeypatch):
    """As SLURM gives them to a node whose driver is too old."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (problem,) = check_node(copied_config, gpus=0, ranks=2)["problems"]
    assert problem.startswith("GPUs: this machine has a GPU that torch cannot use")


@pytest.mark.parametrize(("address", "interface"), [("127.0.1.1", ""), ("127.0.1.1", "ib0"), ("10.0.0.7", "")])
def test_a_name_that_leads_back_to_the_node_is_named(copied_config, monkeypatch, address, interface):
    """Debian's /etc/hosts has it so; gloo would give it to the other nodes."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setattr("socket.gethostbyname", lambda name: address)
    (problem,) = check_node(copied_config, gpus=0, ranks=2)["problems"] or [""]
    assert ("resolves to 127.0.1.1, which other nodes cannot reach: set GLOO_SOCKET_IFNAME" in problem) == (
        address.startswith("127.") and not interface
    )


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_shards_that_cannot_be_read_are_named(copied_config, tmp_path, fault):
    last = tmp_path / "latents/shard-00002.tar"
    raw = last.read_bytes()
    last.unlink() if fault == "gone" else last.write_bytes(raw[:-1])
    (problem,) = check_node(copied_config, gpus=0, ranks=2)["problems"]
    assert problem.startswith("shards: ") and "shard-00002" in problem


def test_a_disk_without_room_is_named(copied_config, monkeypatch):
    monkeypatch.setattr("mf_dist.config.cost.checkpoint_bytes", lambda config: 1 << 60)
    (problem,) = check_node(copied_config, gpus=0, ranks=2)["problems"]
    assert problem.startswith("checkpoints: ") and "MiB free" in problem


def write_node(into, name, problems=(), has_data=True, **same):
    """Writes the result of one node."""
    result = {"node": name, "same": {"torch": "2", **same}, "problems": list(problems), "has_data": has_data}
    write_json(into / f"{name}.json", result)


def verdict(into, *nodes, reason=""):
    """The line that the command prints."""
    options = ["--into", into, "--reason", reason]
    return run_python("-m", "mf_dist.jobs.preflight", "judge", *options, *nodes).stdout.strip()


def test_silent_differing_and_broken_nodes_are_blamed(tmp_path):
    for name in ("n1", "n2", "n3"):
        write_node(tmp_path, name)
    write_node(tmp_path, "n4", torch="1")
    write_node(tmp_path, "n5", ["GPUs: 7 GPUs visible, 8 expected"])
    (tmp_path / "n7.json").write_text("{")
    bad, _ = judge(tmp_path, [f"n{i}" for i in range(1, 8)])
    assert bad == {
        "n4": ["torch is 1, elsewhere 2"],
        "n5": ["GPUs: 7 GPUs visible, 8 expected"],
        "n6": ["it did not answer"],
        "n7": ["it did not answer"],
    }


def test_network_results(tmp_path):
    """A node without a result, unlike the others; a wrong sum; and the speed of the slowest."""
    for name, speed, problems in (("n1", 90.0, []), ("n2", 80.0, ["a wrong sum from the all-reduce within a node"])):
        write_node(tmp_path, name)
        result = {"node": name, "problems": problems, "within a node": {"gb_per_second": speed, "ranks": 8}}
        (tmp_path / f"{name}.network.json").write_text(json.dumps(result))
    write_node(tmp_path, "n3")
    bad, lines = judge(tmp_path, ["n1", "n2", "n3"])
    assert bad == {"n2": ["a wrong sum from the all-reduce within a node"], "n3": ["its ranks did not answer"]}
    assert lines == ["all-reduce within a node: 8 ranks, 80.0 GB/s a rank on the slowest node, n2"]


def test_a_wrong_sum_over_all_nodes_blames_none_before_the_pairs(tmp_path):
    """All nodes see it. The pairs then show the node that fails in both of its own."""
    nodes = ["n1", "n2", "n3"]
    for name in nodes:
        write_node(tmp_path, name)
        over_all = {"gb_per_second": 1.0, "ranks": 6, "is_right": False}
        write_json(tmp_path / f"{name}.network.json", {"node": name, "problems": [], "over all nodes": over_all})
    assert verdict(tmp_path, *nodes) == "failed - a wrong sum from the all-reduce over all nodes"
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n1")):
        write_pair(tmp_path, first, second, works=True)
        if "n2" in (first, second):
            for name in (first, second):
                result = {"node": name, "problems": [], "over all nodes": over_all}
                write_json(tmp_path / "pairs" / f"{first}+{second}" / f"{name}.network.json", result)
    assert verdict(tmp_path, *nodes) == "bad n2 n2: the all-reduce with either neighbour fails"


def test_problems_of_all_nodes_are_no_nodes_fault(tmp_path):
    write_node(tmp_path, "n1", ["checkpoints: no room"])
    write_node(tmp_path, "n2", ["checkpoints: no room"])
    expected = "failed - on all nodes, n1: checkpoints: no room; n2: checkpoints: no room"
    assert verdict(tmp_path, "n1", "n2") == expected
    assert verdict(tmp_path, "n1") == "bad n1 n1: checkpoints: no room"
    write_node(tmp_path, "n2")
    assert verdict(tmp_path, "n1", "n2") == "bad n1 n1: checkpoints: no room"
    write_node(tmp_path, "n1")
    assert verdict(tmp_path, "n1", "n2") == "good -"


def test_data_that_no_node_has_are_refused(tmp_path):
    """On a single node, or on one of two, the cause may be that node's missing disk."""
    why = "shards: no finished dataset at 'data'"
    write_node(tmp_path, "n1", [why], has_data=False)
    write_node(tmp_path, "n2", [why], has_data=False)
    assert verdict(tmp_path, "n1", "n2") == f"refused - on all nodes, {why}"
    assert verdict(tmp_path, "n1") == f"bad n1 n1: {why}"
    write_node(tmp_path, "n2")
    assert verdict(tmp_path, "n1", "n2") == f"bad n1 n1: {why}"


def write_pair(into, first, second, works):
    """Writes the results of two nodes: with the all-reduce over both, or only with those within each node."""
    for name in (first, second):
        result = {"node": name, "problems": [], "within a node": {}} | (
            {"over all nodes": {"is_right": True}} if works else {}
        )
        folder = into / "pairs" / f"{first}+{second}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.network.json", result)


def test_a_node_that_fails_with_both_neighbours_is_to_blame(tmp_path):
    nodes = ["n1", "n2", "n3", "n4"]
    for name in nodes:
        write_node(tmp_path, name)
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n4"), ("n4", "n1")):
        write_pair(tmp_path, first, second, works=second != "n1" and first != "n1")
    answer = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    assert answer == "bad n1 n1: the all-reduce with either neighbour fails"
    write_pair(tmp_path, "n4", "n1", works=True)  # of n1 and n2 either may be to blame, or the cable between them
    answer = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    why = "which node is to blame cannot be told: of the pairs"
    assert answer == f"failed - the all-reduce failed; {why} n1+n2 failed"
    for first, second in (("n1", "n2"), ("n2", "n3"), ("n3", "n4"), ("n4", "n1")):
        write_pair(tmp_path, first, second, works=True)
    assert verdict(tmp_path, *nodes, reason="the all-reduce failed").endswith(f"{why} none failed")
    shutil.rmtree(tmp_path / "pairs")
    (tmp_path / "pairs").mkdir()
    answer = verdict(tmp_path, *nodes, reason="the all-reduce failed")
    assert answer.endswith("n1+n2, n2+n3, n3+n4, n4+n1 failed") and answer.startswith("failed - ")


def test_the_folder_for_staged_shards_is_checked(tiny_config, tmp_path):
    """tests/slurm checks its free space, on a small disk."""
    config = load_config(str(tiny_config), ["data.stage=dir", f"data.stage_dir={tmp_path}/scratch"])
    assert check_node(config, gpus=0, ranks=2)["problems"] == []
    (tmp_path / "scratch").rmdir()
    (tmp_path / "scratch").touch()
    (problem,) = check_node(config, gpus=0, ranks=2)["problems"]
    assert problem.startswith("staging: ") and f"{tmp_path}/scratch" in problem


def test_two_nodes_that_differ_are_both_named(tmp_path):
    """It is unknown which is right, so none is excluded."""
    write_node(tmp_path, "n1", torch="bad")
    write_node(tmp_path, "n2")
    bad, _ = judge(tmp_path, ["n1", "n2"])
    assert bad == {"n1": ["torch is bad, and nodes differ"], "n2": ["torch is 2, and nodes differ"]}
