"""Files that are there, whole, after a power cut. No torch."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np


def partial_path(path: Path) -> Path:
    """Where to write what will be renamed to `path`: a name that nobody else has, on any machine."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Atomic: the file is the old one or the new one, whatever happens."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Atomic, as write_json; `write` is given the file."""
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
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
