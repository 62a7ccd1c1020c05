"""The stream of training batches: a pure function of (seed, samples_seen), for any ranks, workers and micro-batches.

Global slot i is image order(seed, i // N)[i % N]: batches cross epochs, none is incomplete. With share n/d of
r = t rows, slot i has r = t where i % d < n; inside a micro-batch those rows come first. A micro-batch is a multiple of
d, so its number of r = t rows is the same at whatever slot it begins: a run may change its batch size at any image.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mf_dist.config.objectives import Objective
from mf_dist.config.schema import Config
from mf_dist.data.shards import LatentShards
from mf_dist.runtime import rng
from mf_dist.runtime.errors import UserError

LAUNCHER_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


class Batch(NamedTuple):
    """A micro-batch of B rows and everything random about it, on the CPU."""

    moments: Tensor
    """(B, 2C, S, S) fp16, posterior mean and std, unscaled."""
    labels: Tensor
    """(B,) int64."""
    draws: dict[str, Tensor]
    """What the objective draws for each row, fp32, each (B, ...)."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Loader processes send NumPy arrays, through their pipe. Tensors would need space in /dev/shm, a descriptor
        each and a socket below TMPDIR; errors with these are lost in a thread of the process, and training waits."""
        draws = {name: tensor.numpy() for name, tensor in self.draws.items()}
        return _batch_of_arrays, (self.moments.numpy(), self.labels.numpy(), draws)

    def to(self, device: torch.device) -> "Batch":
        """Copies from pinned memory do not wait for the GPU."""
        moments, labels = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        return Batch(moments, labels, {name: a.to(device, non_blocking=True) for name, a in self.draws.items()})


def _batch_of_arrays(moments: npt.NDArray[Any], labels: npt.NDArray[Any], draws: dict[str, npt.NDArray[Any]]) -> Batch:
    of_tensors = {name: torch.from_numpy(array) for name, array in draws.items()}
    return Batch(torch.from_numpy(moments), torch.from_numpy(labels), of_tensors)


class LatentStream(Dataset[Batch]):
    """stream[i] is the micro-batch of the slots [i, i + m) of the global stream."""

    def __init__(self, shards: LatentShards, seed: int, micro_batch: int, objective: Objective, flip: bool) -> None:
        self.shards, self.seed, self.micro_batch, self.flip = shards, seed, micro_batch, flip
        self.share = objective.share_r_equals_t
        channels, *side = shards.moments_shape
        self.draws = objective.draws((channels // 2, side[0], side[1]))
        self._orders: dict[int, npt.NDArray[np.int32]] = {}

    def __getitem__(self, first_slot: int) -> Batch:
        slots = np.arange(first_slot, first_slot + self.micro_batch)
        r_below_t = slots % self.share.denominator >= self.share.numerator
        slots = slots[np.argsort(r_below_t, kind="stable")]
        drawn, mirrored = zip(*(rng.train_draws(self.seed, int(slot), self.draws) for slot in slots), strict=True)
        rows = [self._image(int(slot)) for slot in slots]
        moments, labels = self.shards.batch(rows, [self.flip and mirror for mirror in mirrored])
        return _batch_of_arrays(moments, labels, {name: np.stack([row[name] for row in drawn]) for name in self.draws})

    def _image(self, slot: int) -> int:
        """Index of the image in a global slot."""
        epoch, position = divmod(slot, self.shards.count)
        if epoch not in self._orders:
            self._orders = {epoch: rng.order(self.seed, epoch, self.shards.count)}
        return int(self._orders[epoch][position])


def _end_with_trainer(worker: int) -> None:
    """Lets a loader process end only on the trainer's SIGTERM, or with the trainer. A launcher that stops a run also
    signals the loader processes; if one ended then, the trainer would fail before saving."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent, trainer = os.getppid(), multiprocessing.parent_process()  # from python 3.14 on the parent is a fork server
    assert trainer is not None

    def wait_for_trainer() -> None:
        while os.getppid() == parent and trainer.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer.pid:
                break
        os._exit(0)

    threading.Thread(target=wait_for_trainer, daemon=True).start()


def training_batches(
    shards: LatentShards, config: Config, samples_seen: int, rank: int, world_size: int, pin_memory: bool
) -> Iterator[Batch]:
    """This rank's micro-batches from slot `samples_seen`, any number, to the end of the run: of each global batch of
    A x W micro-batches, numbers rank, rank + W, ... Raises UserError if the data is damaged."""
    micro_batch = config.train.micro_batch
    assert micro_batch is not None
    end = samples_seen + config.steps_left(samples_seen) * config.train.batch_size
    loader = DataLoader(
        LatentStream(shards, config.train.seed, micro_batch, config.objective, config.data.flip),
        batch_size=None,
        sampler=range(samples_seen + rank * micro_batch, end, world_size * micro_batch),
        num_workers=config.data.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_end_with_trainer,
        generator=torch.Generator(),  # for the base seed, which the loader would draw from the global generator
    )
    batches = _start(loader)
    try:
        yield from batches
    except UserError as error:  # a loader process sends its traceback, whose last line is the error
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix("mf_dist.runtime.errors.UserError: ")
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # as of an error in such a process
            raise
        raise UserError(
            f"a loader process has ended unexpectedly ({str(error).splitlines()[0]}): was it killed, as by the kernel "
            "when memory is short? Lower data.num_workers, or set it to 0"
        ) from None


def _start(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; its processes run. Raises UserError if they cannot be started."""
    # blocked in all processes that this starts: in loaders until they handle them, in a fork server for good
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, LAUNCHER_SIGNALS)
    try:
        if loader.num_workers:
            torch.multiprocessing.Queue().close()  # raises here what would leave torch's iterator half built
        return iter(loader)
    except OSError as error:  # a semaphore takes a page of /dev/shm
        raise UserError(
            f"cannot start data.num_workers={loader.num_workers} loader processes: {error.strerror or error}; check "
            "/dev/shm (df), open files and processes (ulimit -n, -u) and memory, or set data.num_workers=0"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
