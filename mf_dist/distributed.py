"""The process group and who we are in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mf_dist.launch import launched_place


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the launcher's process group, or makes one of a single process that opens no port."""
    rank, world_size, local_rank = launched_place()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if world_size > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield Ranks(rank, world_size, device)
    # only at a good end: after an error the others would wait here for a rank that is gone
    dist.barrier()  # the first to leave would break the connections of those still at work
    dist.destroy_process_group()


def first_ranks_number(number: int, device: torch.device) -> int:
    """The whole number that rank 0 passed in, on every rank."""
    tensor = torch.tensor(number, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values)
    return values
