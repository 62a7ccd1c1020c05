"""Waits of the host: reads of scalars, copies to the host, copies from pageable memory, explicit synchronisation."""

import atexit
import collections
import os
import traceback
from pathlib import Path

import torch

from simcuda import device

counts: collections.Counter = collections.Counter()
"""(kind, lines of code, innermost first) -> how often, since counting began."""
FRAMES = 4
HIDDEN = ("/simcuda/", "/torch/", "runpy")

_is_counting = False
_tensor_to = torch.Tensor.to


def record(kind: str) -> None:
    if not _is_counting:
        return
    stack = [f for f in traceback.extract_stack(limit=40) if not any(part in f.filename for part in HIDDEN)]
    lines = (f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno} {f.name}" for f in reversed(stack[-FRAMES:]))
    counts[(kind, " <- ".join(lines))] += 1


def count(is_on: bool = True) -> None:
    """Begins to count from zero, or ends."""
    global _is_counting
    _is_counting = is_on
    counts.clear()
    device.on_sync(record if is_on else None)


def total() -> int:
    return sum(counts.values())


def report() -> str:
    return "".join(f"{n:6} {kind:45} {lines}\n" for (kind, lines), n in counts.most_common())


def _to(self, *args, **options):
    """A copy from pageable memory waits, whatever non_blocking says; one from pinned memory does not."""
    target = args[0] if args else options.get("device")
    is_up = isinstance(target, str | torch.device) and torch.device(target).type == "cuda" and not self.is_cuda
    if is_up and options.get("non_blocking") and not self.is_pinned() and self.numel():
        record("copy from pageable host memory (non_blocking)")
    return _tensor_to(self, *args, **options)


def install() -> None:
    torch.Tensor.to = _to
    path = os.environ.get("SIMCUDA_WAITS")
    if path:
        count()
        atexit.register(lambda: Path(path).write_text(report()))


def uninstall_copies() -> None:
    """Gives Tensor.to back to torch.compile, which traces the original only."""
    torch.Tensor.to = _tensor_to
