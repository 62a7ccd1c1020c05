"""Looks at every node before training does, so that a bad one is named and not searched for among stack traces.

    srun python -m mf_dist.jobs.preflight node --into DIR --gpus 8 --ranks 16 CONFIG     # one a node: DIR/NODE.json
    srun torchrun ... -m mf_dist.jobs.preflight network --into DIR                # one a GPU: DIR/NODE.network.json
    python -m mf_dist.jobs.preflight judge --into DIR n1 n2       # good | bad NODES WHY | failed - WHY | refused - WHY

node: versions, GPUs that compute, room for checkpoints and staged shards, shards that can be read. network: an
all-reduce within each node, then over all nodes: its sum and its speed. If that fails, the launcher runs the network
step on pairs of neighbours in the ring of nodes, in DIR/pairs/A+B: a node that fails with both neighbours is bad. Nodes
write their results into a folder that they share, so that a node without a result is known too; judge compares them. A
step that has not run is not judged.
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
from mf_dist.train import check

GPU_NUMBERS = 64 << 20
"""fp32 numbers in an all-reduce among GPUs: 256 MiB, about one bucket of a large model."""
CPU_NUMBERS = 1 << 20
WITHIN, OVER_ALL = "within a node", "over all nodes"
REPEATS = 5


def node_name() -> str:
    """As SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_node(config: Config, gpus: int, ranks: int) -> dict[str, Any]:
    """What one node says of itself. problems: a line each, none if it is fit to train."""
    import torch

    from mf_dist.runtime.environment import versions

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    same = {**versions(), "cuda": str(torch.version.cuda), "device": device}
    looks = {
        "GPUs": lambda: _check_gpus(gpus),
        "shards": lambda: _check_shards(config),
        "checkpoints": lambda: _check_disk(check(config, ranks, needs_data=False)),
        "staging": lambda: _check_scratch(config),
    }
    problems = []
    for what, look in looks.items():
        try:
            look()
        except (UserError, OSError, RuntimeError) as error:
            problems.append(f"{what}: {' '.join(str(error).split())}")
    return {"node": node_name(), "same": same, "problems": problems, "has_data": _has_data(config)}


def _check_gpus(expected: int) -> None:
    """Each must multiply two matrices right."""
    import torch

    found = torch.cuda.device_count()
    if found < expected:
        raise UserError(f"{found} GPUs visible, {expected} expected")
    for number in range(expected):
        ones = torch.ones(512, 512, device=f"cuda:{number}")
        if float((ones @ ones).sum()) != 512.0**3:
            raise UserError(f"GPU {number} computes a wrong product")


def _check_shards(config: Config) -> None:
    """All there with the right size and index, and the first and the last sample can be read."""
    from mf_dist.data.shards import LatentShards

    shards = LatentShards(config.data.path)
    for sample in (0, shards.count - 1):
        shards[sample][0].sum()


def _has_data(config: Config) -> bool:
    from mf_dist.data.shards import read_manifest

    try:
        return read_manifest(config.data.path) is not None
    except (UserError, OSError):  # it is damaged, and one of the problems
        return True


def _check_scratch(config: Config) -> None:
    """The folder for copies of the shards has room for them."""
    from mf_dist.data.shards import read_manifest
    from mf_dist.data.staging import check_free_space

    manifest = read_manifest(config.data.path)
    if config.data.stage_dir and manifest:
        check_free_space(Path(config.data.stage_dir), manifest)


def _check_disk(config: Config) -> None:
    """The run's folder can be written here and has room."""
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
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        own = None
        for first in range(0, ranks.world_size, here):  # every rank makes every group
            group = dist.new_group(list(range(first, first + here)))
            own = group if first <= ranks.rank < first + here else own
        said: dict[str, Any] = {"node": node_name(), "problems": []}
        for name, group in ((WITHIN, own), (OVER_ALL, dist.group.WORLD)):
            speed, is_right = _all_reduce(group, ranks.device)
            said[name] = {"gb_per_second": speed, "ranks": dist.get_world_size(group), "is_right": is_right}
            if not is_right and name == WITHIN:  # over all, no node is to blame for what all of them see
                said["problems"].append(f"a wrong sum from the all-reduce {name}")
            if ranks.is_local_rank_zero:
                write_json(path, said)
            dist.barrier()
            if not is_right:  # whichever rank of the node saw it
                write_json(path, said)


def _all_reduce(group: Any, device: Any) -> tuple[float, bool]:
    """GB/s that each rank sends and receives (2 (n - 1) / n bytes a byte), the best of REPEATS; whether it adds up."""
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
    of_all = torch.tensor([float(is_right)], device=device)
    dist.all_reduce(of_all, dist.ReduceOp.MIN, group=group)  # one rank of the group speaks for all
    return 2 * (count - 1) / count * 4 * size / best / 1e9, bool(of_all.item() == 1)


def judge(into: Path, nodes: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(problems of each bad node, lines for the log) from what the nodes left in `into`."""
    looked = {node: _read(into / f"{node}.json") for node in nodes}
    bad = {node: said["problems"] if said else ["it did not answer"] for node, said in looked.items()}
    told = {node: said["same"] for node, said in looked.items() if said}
    for node, lines in _odd_ones(told).items():
        bad[node] += lines
    network = {node: said for node in nodes if (said := _read(into / f"{node}.network.json"))}
    if network:  # if no node has a word to say, none is to blame
        for node in nodes:
            bad[node] += network[node]["problems"] if node in network else ["its ranks did not answer"]
    for node in _without_a_partner(into / "pairs", nodes):
        bad[node].append("the all-reduce with either neighbour fails")
    return {node: problems for node, problems in bad.items() if problems}, _speeds(network)


def pairs_that_work(folder: Path, nodes: list[str]) -> dict[tuple[str, str], bool]:
    """Of the ring of nodes, whether each pair of neighbours had its all-reduce; empty if that has not been tried."""
    if not folder.is_dir():
        return {}
    ring = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
    return {(a, b): all(_is_through(folder / f"{a}+{b}/{node}.network.json") for node in (a, b)) for a, b in ring}


def _is_through(path: Path) -> bool:
    said = _read(path)
    return said is not None and OVER_ALL in said and said[OVER_ALL]["is_right"] and not said["problems"]


def _without_a_partner(folder: Path, nodes: list[str]) -> list[str]:
    """Nodes that fail with both neighbours while others do not; where all pairs fail, none can be told."""
    works = pairs_that_work(folder, nodes)
    if not any(works.values()):
        return []
    return [node for node in nodes if not any(works[pair] for pair in works if node in pair)]


def _odd_ones(told: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What a node has unlike most. Where there is no majority, nobody knows who is right: all are named."""
    counts = Counter(json.dumps(same) for same in told.values()).most_common()
    if len(counts) < 2:
        return {}
    usual, has_majority = json.loads(counts[0][0]), 2 * counts[0][1] > len(told)
    differing = [name for name in usual if len({json.dumps(same[name]) for same in told.values()}) > 1]
    if not has_majority:
        return {
            node: [f"{name} is {same[name]}, and nodes differ" for name in differing] for node, same in told.items()
        }
    return {
        node: [f"{name} is {same[name]}, elsewhere {usual[name]}" for name in differing if same[name] != usual[name]]
        for node, same in told.items()
    }


def _speeds(network: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for where in (WITHIN, OVER_ALL):
        speeds = {node: said[where] for node, said in network.items() if where in said}
        if speeds:
            slowest = min(speeds, key=lambda node: speeds[node]["gb_per_second"])
            speed, ranks = speeds[slowest]["gb_per_second"], speeds[slowest]["ranks"]
            lines.append(f"all-reduce {where}: {ranks} ranks, {speed:.2f} GB/s a rank on the slowest node, {slowest}")
    return lines


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _judge(into: Path, nodes: list[str], reason: str) -> None:
    """On stderr what is measured, on stdout the verdict; `reason`: why a step before this failed, if one did. What all
    of several nodes have is no node's fault, and none is left out for it; data that none of them has are a mistake."""
    bad, lines = judge(into, nodes)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    words = "; ".join(f"{node}: {', '.join(problems)}" for node, problems in bad.items())
    looked = [_read(into / f"{node}.json") for node in nodes]
    network = [said for node in nodes if (said := _read(into / f"{node}.network.json")) and OVER_ALL in said]
    if not reason and not all(said[OVER_ALL]["is_right"] for said in network):
        reason = f"a wrong sum from the all-reduce {OVER_ALL}"
    if len(nodes) > 1 and all(said and not said["has_data"] for said in looked):
        print("refused", "-", f"on all nodes, {'; '.join(bad[nodes[0]])}")
    elif len(bad) == len(nodes) > 1:
        print("failed", "-", f"on all nodes, {words}")
    elif bad:
        print("bad", ",".join(bad), words)
    else:
        print("failed" if reason else "good", "-", reason + (_untold(into, nodes) if reason else ""))


def _untold(into: Path, nodes: list[str]) -> str:
    """Why no node is named."""
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
    parser.add_argument("--into", type=Path, required=True, help="folder that all nodes share")
    parser.add_argument("--gpus", type=int, default=0, help="node: GPUs that must be there")
    parser.add_argument("--ranks", type=int, default=1, help="node: processes that will train (default 1)")
    parser.add_argument("--patience", type=float, default=120, help="network: seconds to wait for others (default 120)")
    parser.add_argument("--reason", default="", help="judge: why the step before failed, if it did")
    parser.add_argument("--allow-config-change", action="store_true", help="as for mf_dist.train; says nothing here")
    args = parser.parse_intermixed_args()
    args.into.mkdir(parents=True, exist_ok=True)
    if args.step == "node":
        config = load_config(args.rest[0], args.rest[1:])
        write_json(args.into / f"{node_name()}.json", check_node(config, args.gpus, args.ranks))
    elif args.step == "network":
        check_network(args.into, args.patience)
    else:
        _judge(args.into, args.rest, args.reason)


if __name__ == "__main__":
    sys.exit(main())
