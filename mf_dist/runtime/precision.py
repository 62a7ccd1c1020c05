"""Context managers for the precision and the number of threads of a network's computation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
"""fp32: full products and convolutions. tf32: their inputs have 10 mantissa bits, on GPUs with TF32. bf16: 8 bits."""


@contextmanager
def compute_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """torch's default allows TF32 in convolutions but not in matrix products; here in both or in neither."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def single_cpu_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: the last bits of a convolution depend on the number of threads, and results must not depend on the
    machine. Use more processes instead."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
