"""Atomic and durable file writes. Does not import torch."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np


def partial_path(path: Path) -> Path:
    """Where to write what will be renamed to `path`: a name unique across processes and machines."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Atomic: even after a power cut the file is either the old or the new one, complete."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Atomic, as write_json; `write` is called with the open binary file."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Atomic, as write_json: uncompressed arrays by name, each with a checksum."""
    write_atomic(path, lambda file: np.savez(file, **arrays))


def fsync_folder(folder: Path) -> None:
    """Makes created and renamed entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
