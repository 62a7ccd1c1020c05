"""Sums between two log lines: of the loss's parts, and of the time spent where."""

import math
import resource
import time

import torch
from torch import Tensor

from mf_dist.runtime.distributed import sum_over_ranks


class Throughput:
    """Sums between two log lines: of the loss's parts, and of the time spent where."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.paused, self.since = 0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, Tensor]) -> None:
        self.sums = {name: self.sums[name] + pair if name in self.sums else pair for name, pair in sums.items()}

    def means(self) -> dict[str, float | None]:
        """Per row over all ranks and steps; None where no row counts (no r < t rows in flow matching)."""
        table = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        return {name: total / n if n else None for name, (total, n) in zip(self.sums, table, strict=True)}

    def speed(self, batch_size: int) -> dict[str, float]:
        """Training alone: sampling and saving are left out."""
        seconds = time.perf_counter() - self.since - self.paused
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "images_per_second": self.steps * batch_size / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait_share": self.waited / seconds,
            "memory_gib": memory / 2**30,
        }

    def waiting(self) -> "_Stopwatch":
        return _Stopwatch(self, "waited")

    def pausing(self) -> "_Stopwatch":
        return _Stopwatch(self, "paused")


class _Stopwatch:
    """Adds the time of a `with` block to one of the meter's fields."""

    def __init__(self, throughput: Throughput, field: str) -> None:
        self.throughput, self.field, self.started = throughput, field, math.nan

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self.throughput, self.field, getattr(self.throughput, self.field) + time.perf_counter() - self.started)
