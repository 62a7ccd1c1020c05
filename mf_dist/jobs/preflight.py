"""Checks every node before training, so that a bad one is named instead of searched for in stack traces.

    srun python -m mf_dist.jobs.preflight node --into DIR --gpus 8 --ranks 16 CONFIG   # one per node: DIR/NODE.json
    srun torchrun ... -m mf_dist.jobs.preflight network --into DIR              # one per GPU: DIR/NODE.network.json
    python -m mf_dist.jobs.preflight judge --into DIR n1 n2       # good | bad NODES WHY | failed - WHY | refused - WHY

node: versions, working GPUs, a compiler, room for checkpoints and staged shards, readable shards. network: an
all-reduce within each node, then over all nodes: its sum and its speed. If that fails, the launcher runs the network
step on pairs of neighbours in the ring of nodes, in DIR/pairs/A+B: a node that fails with both neighbours is bad. Nodes
write their results into a shared folder, so that a node without a result is detected too; judge compares them. A step
that has not run is not judged.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mf_dist.config.schema import Config, load_config
from mf_dist.runtime.atomic_files import write_json
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.paths import expanded_path
from mf_dist.train import check

GPU_NUMBERS = 64 << 20
"""fp32 elements in an all-reduce among GPUs: 256 MiB, about one bucket of a large model."""
CPU_NUMBERS = 1 << 20
WITHIN, OVER_ALL = "within a node", "over all nodes"
REPEATS = 5


def node_name() -> str:
    """SLURM's name of this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_node(config: Config, gpus: int, ranks: int) -> dict[str, Any]:
    """The result of one node. problems: one line each, none if it is fit to train."""
    import torch

    from mf_dist.runtime.environment import versions

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    same = {**versions(), "cuda": str(torch.version.cuda), "device": device}
    checks = {
        "GPUs": lambda: _check_gpus(gpus),
        "host name": _check_host_name,
        "shards": lambda: _check_shards(config),
        "compiler": lambda: _check_compiler(config),
        "checkpoints": lambda: _check_disk(check(config, ranks, needs_data=False)),
        "staging": lambda: _check_scratch(config),
    }
    problems = []
    for name, run_check in checks.items():
        try:
            run_check()
        except (UserError, OSError, RuntimeError) as error:
            problems.append(f"{name}: {' '.join(str(error).split())}")
    return {"node": node_name(), "same": same, "problems": problems, "has_data": _has_data(config)}


def _check_gpus(expected: int) -> None:
    """torch must be able to use them, and each must compute a matrix product correctly."""
    import torch

    from mf_dist.runtime.distributed import choose_device

    choose_device(0)
    visible = torch.cuda.device_count()
    if visible < expected:
        raise UserError(f"{visible} GPUs visible, {expected} expected")
    for number in range(expected):
        ones = torch.ones(512, 512, device=f"cuda:{number}")
        if float((ones @ ones).sum()) != 512.0**3:
            raise UserError(f"GPU {number} computes a wrong product")


def _check_host_name() -> None:
    """In a job of several nodes, others must reach this one by the address of its name."""
    from mf_dist.runtime.distributed import check_host_name

    if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        check_host_name()


def _check_compiler(config: Config) -> None:
    """The first step of a run compiles, if it does, minutes after the start."""
    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import choose_device

    if config.engine.compile:
        require_compiler(choose_device(0), "set engine.compile=false")


def _check_shards(config: Config) -> None:
    """All exist with the right size and index, and the first and the last sample are readable."""
    from mf_dist.data.shards import LatentShards

    shards = LatentShards(config.data.path)
    for sample in (0, shards.count - 1):
        shards[sample][0].sum()


def _has_data(config: Config) -> bool:
    from mf_dist.data.shards import read_manifest

    try:
        return read_manifest(config.data.path) is not None
    except (UserError, OSError):  # damaged, which is one of the problems
        return True


def _check_scratch(config: Config) -> None:
    """The folder for staged shards has room for them."""
    from mf_dist.data.shards import read_manifest
    from mf_dist.data.staging import check_free_space

    manifest = read_manifest(config.data.path)
    if config.data.stage_dir and manifest:
        check_free_space(Path(config.data.stage_dir), manifest)


def _check_disk(config: Config) -> None:
    """The run's folder is writable from this node and has room."""
    from mf_dist.checkpoint.writer import check_free_space
    from mf_dist.config.cost import checkpoint_bytes

    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".preflight-{node_name()}"
    probe.write_bytes(b"room")
    probe.unlink()
    check_free_space(run_dir / "checkpoints", checkpoint_bytes(config))


def check_network(into: Path, patience: float) -> None:
    """Run by every rank under torchrun: first the ranks of each node among themselves, then all. `patience`: seconds
    that a rank waits for the others."""
    import torch.distributed as dist

    from mf_dist.runtime.distributed import process_group

    path = into / f"{node_name()}.network.json"
    with process_group(patience) as ranks:
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        own = None
        for first in range(0, ranks.world_size, ranks_per_node):  # every rank must create every group
            group = dist.new_group(list(range(first, first + ranks_per_node)))
            own = group if first <= ranks.rank < first + ranks_per_node else own
        result: dict[str, Any] = {"node": node_name(), "problems": []}
        for name, group in ((WITHIN, own), (OVER_ALL, dist.group.WORLD)):
            speed, is_right = _all_reduce(group, ranks.device)
            result[name] = {"gb_per_second": speed, "ranks": dist.get_world_size(group), "is_right": is_right}
            if not is_right and name == WITHIN:  # a wrong sum over all nodes shows on all, so it is no node's problem
                result["problems"].append(f"a wrong sum from the all-reduce {name}")
            if ranks.is_local_rank_zero:
                write_json(path, result)
            dist.barrier()
            if not is_right:  # from every rank of the node
                write_json(path, result)


def _all_reduce(group: Any, device: Any) -> tuple[float, bool]:
    """GB/s that each rank sends and receives (2 (n - 1) / n bytes per byte), best of REPEATS; whether the sum was
    right on all ranks of the group."""
    import torch
    import torch.distributed as dist

    count, size = dist.get_world_size(group), GPU_NUMBERS if device.type == "cuda" else CPU_NUMBERS
    best, is_right = float("inf"), True
    for _ in range(REPEATS):
        numbers = torch.full((size,), float(dist.get_rank(group) + 1), device=device)
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        is_right &= bool((numbers == count * (count + 1) / 2).all())  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    right_on_all = torch.tensor([float(is_right)], device=device)
    dist.all_reduce(right_on_all, dist.ReduceOp.MIN, group=group)
    return 2 * (count - 1) / count * 4 * size / best / 1e9, bool(right_on_all.item() == 1)


def judge(into: Path, nodes: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(problems of each bad node, lines for the log), from the results of the nodes in `into`."""
    results = {node: _read(into / f"{node}.json") for node in nodes}
    bad = {node: result["problems"] if result else ["it did not answer"] for node, result in results.items()}
    for node, lines in _differences({node: result["same"] for node, result in results.items() if result}).items():
        bad[node] += lines
    network = {node: result for node in nodes if (result := _read(into / f"{node}.network.json"))}
    if network:  # without any result no node is to blame
        for node in nodes:
            bad[node] += network[node]["problems"] if node in network else ["its ranks did not answer"]
    for node in _nodes_failing_with_both(into / "pairs", nodes):
        bad[node].append("the all-reduce with either neighbour fails")
    return {node: problems for node, problems in bad.items() if problems}, _speed_lines(network)


def pairs_that_work(folder: Path, nodes: list[str]) -> dict[tuple[str, str], bool]:
    """Whether the all-reduce of each pair of neighbours in the ring of nodes succeeded; empty if no pair was tested."""
    if not folder.is_dir():
        return {}
    ring = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
    return {(a, b): all(_succeeded(folder / f"{a}+{b}/{node}.network.json") for node in (a, b)) for a, b in ring}


def _succeeded(path: Path) -> bool:
    result = _read(path)
    return result is not None and OVER_ALL in result and result[OVER_ALL]["is_right"] and not result["problems"]


def _nodes_failing_with_both(folder: Path, nodes: list[str]) -> list[str]:
    """Nodes that fail with both neighbours while others do not; none if all pairs fail, which names no node."""
    works = pairs_that_work(folder, nodes)
    if not any(works.values()):
        return []
    return [node for node in nodes if not any(works[pair] for pair in works if node in pair)]


def _differences(versions: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """How nodes differ from the majority. Without a majority it is unknown which is right, and all are named."""
    counts = Counter(json.dumps(same) for same in versions.values()).most_common()
    if len(counts) < 2:
        return {}
    usual, has_majority = json.loads(counts[0][0]), 2 * counts[0][1] > len(versions)
    differing = [name for name in usual if len({json.dumps(same[name]) for same in versions.values()}) > 1]
    if not has_majority:
        return {
            node: [f"{name} is {same[name]}, and nodes differ" for name in differing] for node, same in versions.items()
        }
    return {
        node: [f"{name} is {same[name]}, elsewhere {usual[name]}" for name in differing if same[name] != usual[name]]
        for node, same in versions.items()
    }


def _speed_lines(network: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for scope in (WITHIN, OVER_ALL):
        speeds = {node: result[scope] for node, result in network.items() if scope in result}
        if speeds:
            slowest = min(speeds, key=lambda node: speeds[node]["gb_per_second"])
            speed, ranks = speeds[slowest]["gb_per_second"], speeds[slowest]["ranks"]
            rate = f"{three_digits(speed)} GB/s a rank"
            lines.append(f"all-reduce {scope}: {ranks} ranks, {rate} on the slowest node, {slowest}")
    return lines


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _print_verdict(into: Path, nodes: list[str], reason: str) -> None:
    """Prints the speeds on stderr and the verdict on stdout; `reason`: why an earlier step failed, if one did. If
    all of several nodes have problems, none is excluded; data that all of them lack are a mistake in the call."""
    bad, lines = judge(into, nodes)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    text = "; ".join(f"{node}: {', '.join(problems)}" for node, problems in bad.items())
    results = [_read(into / f"{node}.json") for node in nodes]
    network = [result for node in nodes if (result := _read(into / f"{node}.network.json")) and OVER_ALL in result]
    if not reason and not all(result[OVER_ALL]["is_right"] for result in network):
        reason = f"a wrong sum from the all-reduce {OVER_ALL}"
    if len(nodes) > 1 and all(result and not result["has_data"] for result in results):
        print("refused", "-", f"on all nodes, {'; '.join(bad[nodes[0]])}")
    elif len(bad) == len(nodes) > 1:
        print("failed", "-", f"on all nodes, {text}")
    elif bad:
        print("bad", ",".join(bad), text)
    else:
        print("failed" if reason else "good", "-", reason + (_why_no_node_is_named(into, nodes) if reason else ""))


def _why_no_node_is_named(into: Path, nodes: list[str]) -> str:
    """A suffix of the reason, once pairs have been tested."""
    works = pairs_that_work(into / "pairs", nodes)
    if not works:
        return ""
    failing = ", ".join("+".join(pair) for pair, is_good in works.items() if not is_good)
    return f"; which node is to blame cannot be told: of the pairs {failing or 'none'} failed"


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mf_dist.jobs.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=("node", "network", "judge"))
    parser.add_argument("rest", nargs="*", metavar="ARG", help="node: CONFIG [section.key=value ...]; judge: nodes")
    parser.add_argument("--into", type=expanded_path, required=True, help="folder that all nodes share")
    parser.add_argument("--gpus", type=int, default=0, help="node: number of GPUs expected")
    parser.add_argument("--ranks", type=int, default=1, help="node: processes that will train (default 1)")
    parser.add_argument("--patience", type=float, default=120, help="network: seconds to wait for others (default 120)")
    parser.add_argument("--reason", default="", help="judge: why the previous step failed, if it did")
    parser.add_argument("--allow-config-change", action="store_true", help="as for mf_dist.train; has no effect here")
    args = parser.parse_intermixed_args()
    args.into.mkdir(parents=True, exist_ok=True)
    if args.step == "node":
        config = load_config(args.rest[0], args.rest[1:])
        write_json(args.into / f"{node_name()}.json", check_node(config, args.gpus, args.ranks))
    elif args.step == "network":
        check_network(args.into, args.patience)
    else:
        _print_verdict(args.into, args.rest, args.reason)


if __name__ == "__main__":
    sys.exit(main())
