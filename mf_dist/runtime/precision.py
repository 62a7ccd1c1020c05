"""In what precision a network computes, for the length of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
"""fp32: products and convolutions in full. tf32: their inputs have 10 bits, on a GPU that knows it. bf16: 8 bits."""


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """torch's own default lets convolutions use TF32, but not products; here both or none."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: the last bits of a convolution depend on the number of threads, and results must not on who computes
    them. Use more processes instead."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
