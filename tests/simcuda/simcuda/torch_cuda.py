"""torch.cuda as it answers on a machine with H100s."""

import collections
import importlib
import os
import time
import types

import torch

from simcuda import device, waits

DEVICES = int(os.environ.get("SIMCUDA_DEVICES", "1"))
GIB = 2**30
NAME = "NVIDIA H100 80GB HBM3 (simulated)"


class Event:
    def __init__(self, *_, **__):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        waits.record("Event.synchronize")

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Stream:
    """The one stream: work is done when its call returns."""

    device = torch.device("cuda", 0)
    stream_id, device_index, device_type, cuda_stream, priority = 0, 0, 1, 0, 0

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        waits.record("Stream.synchronize")

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class StreamContext:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self.stream

    def __exit__(self, *_):
        pass


class DeviceContext:
    """torch.cuda.device."""

    def __init__(self, index):
        self.index = index if isinstance(index, int) or index is None else torch.device(index).index

    def __enter__(self):
        self.before = device.current_device()
        set_device(self.index)

    def __exit__(self, *_):
        set_device(self.before)


def set_device(target):
    index = target if isinstance(target, int) or target is None else torch.device(target).index
    if index is not None and index >= 0:
        try:
            device.set_device(index)
        except RuntimeError as error:
            raise torch.AcceleratorError(str(error).splitlines()[0]) from None


def exchange_device(index):
    before = device.current_device()
    set_device(index)
    return before


def properties(_=None):
    return types.SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=80 * GIB,
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 * 2**20,
        is_integrated=False,
        gcnArchName="",
        uuid="0",
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
    )


def memory_stats(_=None):
    held, peak = device.held(), device.peak()
    return collections.defaultdict(int, {"allocated_bytes.all.current": held, "allocated_bytes.all.peak": peak})


def pin_memory(self, _=None):
    """Ordinary memory that answers is_pinned(), as the data loader's copies do."""
    if self.is_cuda:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    pinned = self.clone()
    pinned._is_pinned = True
    return pinned


def nothing(*_, **__):
    return None


def distinct(answer):
    """A function of its own: torch.compile tells torch.cuda's functions apart by identity."""
    return (lambda *args, **options: answer(*args, **options)) if isinstance(answer, types.FunctionType) else answer


def install() -> None:
    device.set_device_count(DEVICES)
    answers = {
        "_is_compiled": lambda: True,
        "is_available": lambda: DEVICES > 0,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **_: call(),
        "_is_in_bad_fork": lambda: False,
        "init": nothing,
        "device_count": lambda: DEVICES,
        "current_device": device.current_device,
        "set_device": set_device,
        "device": DeviceContext,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "synchronize": lambda _=None: waits.record("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "current_stream": lambda _=None: Stream(),
        "default_stream": lambda _=None: Stream(),
        "get_device_name": lambda _=None: NAME,
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda _=None: (80 * GIB - device.held(), 80 * GIB),
        "memory_stats": memory_stats,
        "empty_cache": nothing,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda _="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "default_generators": tuple(torch.Generator() for _ in range(max(1, DEVICES))),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
        "nvtx": types.SimpleNamespace(range_push=nothing, range_pop=nothing, mark=nothing),
    }
    answers |= dict.fromkeys(("memory_allocated", "memory_reserved", "memory_cached"), lambda _=None: device.held())
    peaks = ("max_memory_allocated", "max_memory_reserved", "max_memory_cached")
    answers |= dict.fromkeys(peaks, lambda _=None: device.peak())
    resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")
    answers |= dict.fromkeys(resets, lambda _=None: device.reset_peak())
    for name, answer in answers.items():
        setattr(torch.cuda, name, distinct(answer))
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._cuda_getDevice = device.current_device
    torch._C._cuda_getDeviceCount = lambda: DEVICES
    importlib.import_module("torch.cuda.nccl").version = lambda: (2, 29, 7)
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = lambda self, _=None: getattr(self, "_is_pinned", False)
    torch.Tensor.record_stream = nothing
    _define_torchvision_schemas()


def _define_torchvision_schemas() -> None:
    """PyPI's torchvision cannot load its operators beside a CPU build of torch."""
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
