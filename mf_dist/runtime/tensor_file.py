"""Reads .safetensors files.

The library validates the header. Tensors are read by ordinary reads, not through its memory map: there a failing disk,
or a file that becomes shorter, is a signal (SIGBUS) that ends the process without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mf_dist.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000
"""Bytes; the library refuses longer ones."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises UserError as each_tensor."""
    return dict(each_tensor(path))


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one, so that the whole file need not fit into memory. Raises UserError if the file cannot
    be read, is no .safetensors file or has a tensor of another type than DTYPES."""
    with _opened(path) as (file, described):
        for name in described.offset_keys():  # the library has checked that data follow each other without gaps
            entry = described.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {name} has type {entry.get_dtype()}, expected one of {', '.join(DTYPES)}")
            tensor = torch.empty(entry.get_shape(), dtype=DTYPES[entry.get_dtype()])
            into = tensor.reshape(-1).view(torch.uint8).numpy().data
            if file.readinto(into) < len(into):  # type: ignore[attr-defined]
                raise UserError(f"cannot read {path}: it ends within {name}; it was longer when it was opened")
            yield name, tensor


def read_metadata(path: Path) -> dict[str, str]:
    """Texts in the header. Raises UserError if the file cannot be read or is no .safetensors file."""
    with _opened(path) as (_, described):
        return described.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """The file at its first tensor, and the library's view of the header."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.read(min(length, MAX_HEADER))  # raises where the library's map would be a signal
            with safe_open(path, framework="pt") as described:
                yield file, described
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from None
