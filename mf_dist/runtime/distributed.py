"""The process group, this process's rank in it, and collectives that check or share results."""

import hashlib
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mf_dist.runtime.errors import SharedError, UserError
from mf_dist.runtime.launch import rank_from_environment
from mf_dist.runtime.rendezvous import meet

DEVICE_FILES = Path("/dev")
"""Where a driver shows its GPUs as nvidia0, nvidia1, ..."""
UNLIMITED = timedelta(days=3650)
NETWORK_SETTINGS = (
    "GLOO_SOCKET_IFNAME",
    "GLOO_DEVICE_TRANSPORT",
    "NCCL_SOCKET_IFNAME",
    "NCCL_SOCKET_FAMILY",
    "NCCL_NET",
    "NCCL_NET_PLUGIN",
    "NCCL_COMM_ID",
)
"""Variables with which a process group cannot be made on a machine that lacks what they name."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    waiting: dist.ProcessGroup | None = None
    """A group of all ranks on CPUs whose operations have no time limit; None for one process."""

    @property
    def is_local_rank_zero(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, made current, or the CPU if the machine has no GPU or CUDA_VISIBLE_DEVICES hides all.

    Raises UserError if the machine has a GPU that torch cannot use: it would silently compute on the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    if not is_hidden and (visible is not None or any(DEVICE_FILES.glob("nvidia[0-9]*"))):
        reason = (
            f"is a build for CUDA {torch.version.cuda}, whose driver is missing or too old (see nvidia-smi)"
            if torch.version.cuda
            else "is a build without CUDA; install the one for GPUs"
        )
        raise UserError(
            f"this machine has a GPU that torch cannot use: torch {torch.__version__} {reason}. "
            "To run on the CPU on purpose, set CUDA_VISIBLE_DEVICES=-1"
        )
    return torch.device("cpu")


def check_host_name() -> None:
    """Raises UserError where gloo, over several nodes, would give others an address that leads back to themselves."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""  # gloo then takes 127.0.0.1
    if not address or address.startswith("127."):
        raise UserError(
            f"{socket.gethostname()} resolves to {address or 'no address'}, which other nodes cannot reach: set "
            "GLOO_SOCKET_IFNAME to the network interface between the nodes (in slurm/site.env), or correct /etc/hosts"
        )


def interface_problem(uses_nccl: bool) -> str:
    """The variable that names a network interface which this machine does not have, or for gloo one without an address;
    "" if none does. gloo takes names; NCCL prefixes, names after a leading =, and after ^ what to leave out."""
    present = [name for _, name in socket.if_nameindex()]
    problem = ""
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        try:
            dist.ProcessGroupGloo.create_device(interface=name)
        except RuntimeError:
            problem = f"GLOO_SOCKET_IFNAME is {os.environ['GLOO_SOCKET_IFNAME']!r}: no interface {name} with an address"
    text = os.environ.get("NCCL_SOCKET_IFNAME", "") if uses_nccl else ""
    if listed := tuple(filter(None, text.lstrip("^=").split(","))):
        named = [name in listed if "=" in text[:2] else name.startswith(listed) for name in present]
        if all(named) if text.startswith("^") else not any(named):
            problem = f"NCCL_SOCKET_IFNAME is {text!r}: no interface is left"
    where = f"; {socket.gethostname()} has {', '.join(present)}. Set it to the one between the nodes, or unset it"
    return problem and problem + where


def _use_loopback() -> None:
    """For one process, which needs no network: a name service, or settings for the network of another machine, must
    not matter. NCCL reads settings from files too, which a variable overrides."""
    for name in NETWORK_SETTINGS:
        os.environ.pop(name, None)
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def _waiting_group(timeout: float) -> dist.ProcessGroup:
    """A group for Ranks.waiting, whose ranks are connected within `timeout` seconds. A wait for a rank that dies ends:
    its connection breaks."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    group._get_backend(torch.device("cpu"))._set_default_timeout(UNLIMITED)  # type: ignore[attr-defined]
    return group  # type: ignore[no-any-return]


@contextmanager
def process_group(timeout: float = 1800.0) -> Iterator[Ranks]:
    """Joins the launcher's process group, or makes one of a single process that opens no port. `timeout`: seconds that
    one operation may take, from when all ranks are expected to call it; where they wait for each other's work, they use
    Ranks.waiting. Raises UserError if a variable names no usable network interface."""
    launched = rank_from_environment()
    rank, world_size, local_rank = launched
    device = choose_device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed uses the GPU of this number: not the local rank where each rank sees only its own
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # it refuses one that differs
    if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        check_host_name()
    if world_size > 1:
        if problem := interface_problem(uses_nccl=backend == "nccl"):
            raise (SharedError if local_rank else UserError)(problem)  # a line of each machine
    else:
        _use_loopback()
    store = meet(launched, timeout) if world_size > 1 else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    waiting = _waiting_group(timeout) if world_size > 1 else None
    yield Ranks(rank, world_size, device, local_rank, waiting)
    # not after an error: the other ranks would wait here for one that has exited
    dist.barrier()  # a rank that leaves early would break the connections of the others
    dist.destroy_process_group()


def wait_for_all(ranks: Ranks) -> None:
    """Returns once every rank has come here, however long the work takes that it does before."""
    if ranks.waiting is not None:
        dist.all_reduce(torch.zeros(1), group=ranks.waiting)


def broadcast_int(number: int, device: torch.device) -> int:
    """Rank 0's integer, on every rank."""
    tensor = torch.tensor(number, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


@contextmanager
def raise_on_all_ranks(ranks: Ranks) -> Iterator[None]:
    """For work that may fail on a single rank and contains no collective. At its end every rank waits for the others,
    however long their work takes: that of rank 0 alone may take hours. If any failed, all raise the error of the lowest
    failing rank as SharedError. An unexpected exception (neither UserError nor OSError) is raised unchanged on its own
    rank. Otherwise ranks would wait for one that has exited."""
    if ranks.world_size == 1:
        yield
        return
    text, unexpected = None, None
    try:
        yield
    except UserError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except Exception as error:
        text, unexpected = f"{type(error).__name__}: {error}", error
    failed = torch.tensor(ranks.world_size if text is None else ranks.rank)
    dist.all_reduce(failed, dist.ReduceOp.MIN, group=ranks.waiting)
    first = int(failed)
    if unexpected is not None:
        broadcast_text(first, text or "", ranks)
        raise unexpected
    if first < ranks.world_size:
        raise SharedError(broadcast_text(first, text or "", ranks) + (f" (found by rank {first})" if first else ""))


def broadcast_text(rank: int, text: str, ranks: Ranks) -> str:
    """The text of `rank`, on every rank; names that are not UTF-8 are kept."""
    raw = torch.tensor(list(text.encode(errors="surrogatepass")), dtype=torch.uint8, device=ranks.device)
    length = torch.tensor(len(raw), device=ranks.device)
    dist.broadcast(length, src=rank)
    if rank != ranks.rank:
        raw = torch.empty(int(length), dtype=torch.uint8, device=ranks.device)
    dist.broadcast(raw, src=rank)
    return bytes(raw.tolist()).decode(errors="surrogatepass")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def local_peers(device: torch.device) -> list[int]:
    """Process ids of the other ranks on this machine."""
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    own = torch.tensor([host, os.getpid()], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return [pid for other, pid in (a.tolist() for a in gathered) if other == host and pid != os.getpid()]


def check_same_on_all_ranks(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raises UserError on every rank, naming the first tensor whose bits differ between ranks."""
    names, fingerprints = zip(*((name, _fingerprint(tensor)) for name, tensor in tensors), strict=True)
    low = torch.stack(fingerprints)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    for name, is_same in zip(names, (low == high).tolist(), strict=True):
        if not is_same:
            raise UserError(
                f"the ranks hold different {what}: {name} is not the same everywhere; "
                "check that all nodes run the same code, packages and config"
            )


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The int64 sum of the elements' bit patterns."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer).sum(dtype=torch.int64)
