"""The table of a recorded trace: what the steps cost, by class and by name, and what the host waits in.

On a GPU the costs are its kernels and copies; on a CPU operators, each without those that it calls. A cost's class
follows from its name and from what it is called from.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mf_dist.runtime.figures import three_digits

LARGEST = 20
"""Rows of a table."""
HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events."""
OPTIMIZER, ATTENTION = re.compile(r"Optimizer\.step"), re.compile("attention|attend|flash|fmha|sdpa", re.I)
"""In the name of a cost or of anything that it is called from."""
CLASSES = {
    "collectives": re.compile("nccl|c10d::|gloo:", re.I),
    "matrix products": re.compile(
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|aten::((add|b|badd)?mm|linear|matmul|mkldnn\w+)\b", re.I
    ),
    "compiled kernels": re.compile("triton_|compiled", re.I),
    "copies": re.compile("memcpy|memset|copy_", re.I),
}
"""In the name of a cost; the first that fits."""
LOADER, ITEM, SYNCHRONIZE = "enumerate(DataLoader)", "aten::_local_scalar_dense", "Synchronize"
"""In the names of calls in which the host waits."""

Event = dict[str, Any]
Row = dict[str, Any]


@dataclass
class Call:
    """An event of the host; times in microseconds."""

    name: str
    category: str
    correlation: Any
    """Of a launch: that of its kernel."""
    start: float
    end: float
    parent: "Call | None"
    """What it is called from."""
    own: float
    """Its duration without those of the calls that it makes."""

    def chain(self) -> list["Call"]:
        """The call and what it is called from, innermost first."""
        return [self, *(self.parent.chain() if self.parent else [])]


def summarize(events: list[Event]) -> dict[str, Any]:
    """The table of the `traceEvents` of a chrome trace; times in ms, all numbers per step.

    steps, ms; idle_share: of the GPU, None without kernels; classes, costs (the largest by name) and waits: rows of
    name, ms, share of the step's time, calls; costs also have their class. What runs on several streams or threads at
    once counts as often. Raises ValueError if the trace has no steps."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep#")]
    if not steps:
        raise ValueError("the trace has no steps")
    start, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    calls = [call for call in _calls(complete) if start <= call.start < end]
    kernels = [e for e in complete if e.get("cat") in DEVICE and e["ts"] < end and e["ts"] + e["dur"] > start]
    spans = [(max(start, e["ts"]), min(end, e["ts"] + e["dur"])) for e in kernels]
    costs = list(_costs_of_kernels(kernels, spans, calls) if kernels else _costs_of_operators(calls))

    def rows(items: Iterable[tuple[Row, float]]) -> list[Row]:
        return _rows(items, len(steps), end - start)

    return {
        "steps": len(steps),
        "ms": (end - start) / 1e3 / len(steps),
        "idle_share": 1 - _covered(spans) / (end - start) if kernels else None,
        "classes": rows(({"name": of}, duration) for _, of, duration in costs),
        "costs": rows(({"name": name, "class": of}, duration) for name, of, duration in costs),
        "waits": rows(({"name": name}, duration) for name, duration in _waits(calls, has_kernels=bool(kernels))),
    }


def class_of(names: list[str]) -> str:
    """Class of a cost by its name and the names of what it is called from, innermost first."""
    if any(map(OPTIMIZER.search, names)):
        return "optimizer"
    if any(map(ATTENTION.search, names)):
        return "attention"
    return next((name for name, pattern in CLASSES.items() if pattern.search(names[0])), "other")


def _calls(events: list[Event]) -> list[Call]:
    """The host's events, nested by time within their thread."""
    calls: list[Call] = []
    stacks: dict[Any, list[Call]] = defaultdict(list)
    host = (event for event in events if event.get("cat") in HOST)
    for event in sorted(host, key=lambda e: (e["ts"], -e["dur"])):
        start, duration, stack = event["ts"], event["dur"], stacks[event["tid"]]
        while stack and stack[-1].end <= start:
            stack.pop()
        parent = stack[-1] if stack else None
        if parent:
            parent.own -= duration
        correlation = event.get("args", {}).get("correlation")
        stack.append(Call(event["name"], event["cat"], correlation, start, start + duration, parent, duration))
        calls.append(stack[-1])
    return calls


def _costs_of_kernels(
    kernels: list[Event], spans: list[tuple[float, float]], calls: list[Call]
) -> Iterator[tuple[str, str, float]]:
    """(name, class, microseconds within the steps) of each kernel and copy."""
    launches = {call.correlation: call for call in calls if call.correlation is not None}
    for kernel, (start, end) in zip(kernels, spans, strict=True):
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        callers = [call.name for call in launch.chain()] if launch else []
        yield kernel["name"], class_of([kernel["name"], *callers]), end - start


def _costs_of_operators(calls: list[Call]) -> Iterator[tuple[str, str, float]]:
    """(name, class, own microseconds) of each operator, and of gloo's work on its own threads."""
    for call in calls:
        if call.category == "cpu_op" or call.name.startswith("gloo:"):
            yield call.name, class_of([caller.name for caller in call.chain()]), call.own


def _waits(calls: list[Call], has_kernels: bool) -> Iterator[tuple[str, float]]:
    """What the host waits in, and microseconds: the data loader, and synchronizations with the GPU by the operator that
    asks for them. Without a GPU, item(), which would wait for one."""
    for call in calls:
        if call.name.startswith(LOADER):
            yield "data loader", call.end - call.start
        elif SYNCHRONIZE in call.name:
            operator = next((caller.name for caller in call.chain() if caller.category == "cpu_op"), "python")
            yield f"{call.name} in {'item()' if operator == ITEM else operator}", call.end - call.start
        elif call.name == ITEM and not has_kernels:
            yield "item()", call.end - call.start


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _rows(items: Iterable[tuple[Row, float]], steps: int, span: float) -> list[Row]:
    """The largest sums over equal labels, per step; `span`: microseconds of all steps."""
    sums: dict[tuple[str, ...], tuple[Row, list[float]]] = {}
    for label, duration in items:
        sums.setdefault(tuple(label.values()), (label, []))[1].append(duration)
    rows = [
        {
            **label,
            "ms": sum(durations) / 1e3 / steps,
            "share": sum(durations) / span,
            "calls": len(durations) / steps,
        }
        for label, durations in sums.values()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:LARGEST]


def as_text(table: dict[str, Any]) -> str:
    """The table, with `device` and `first_step`, for reading."""
    first, idle = table["first_step"], table["idle_share"]
    lines = [
        f"{table['device']}, steps {first} to {first + table['steps'] - 1}: "
        f"{three_digits(table['ms'])} ms per step while recorded" + ("" if idle is None else f", GPU idle {idle:.1%}")
    ]
    for key, title in {"classes": "by class", "costs": "the largest", "waits": "the host waits in"}.items():
        lines += ["", f"{'ms':>10}{'of step':>9}{'calls':>9}  {title}"]
        for row in table[key]:
            of, ms = f" ({row['class']})" if "class" in row else "", three_digits(row["ms"])
            lines.append(f"{ms:>10}{row['share']:9.1%}{row['calls']:9.1f}  {row['name'][:140]}{of}")
    return "\n".join(lines) + "\n"
