"""Metrics accumulated between two log lines: means of the loss's parts, speed, waiting time and memory."""

import math
import resource
import time

import torch
from torch import Tensor

from mf_dist.runtime.distributed import sum_over_ranks


class Throughput:
    """Accumulates the loss's log sums and the time spent waiting and paused since the last reset()."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.paused, self.since = 0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, Tensor]) -> None:
        self.sums = {name: self.sums[name] + pair if name in self.sums else pair for name, pair in sums.items()}

    def means(self) -> dict[str, float | None]:
        """Means per row over all ranks and steps; None if no row counts (no r < t rows in flow matching)."""
        table = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        return {name: total / n if n else None for name, (total, n) in zip(self.sums, table, strict=True)}

    def speed(self, batch_size: int) -> dict[str, float]:
        """Speed of training without sampling and saving; data_wait_share in [0, 1]; memory_gib: peak of the GPU, or of
        the process on a CPU."""
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
    """Adds the duration of a `with` block to a field of Throughput."""

    def __init__(self, throughput: Throughput, field: str) -> None:
        self.throughput, self.field, self.started = throughput, field, math.nan

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        setattr(self.throughput, self.field, getattr(self.throughput, self.field) + time.perf_counter() - self.started)
