"""Atomic and durable file writes. Does not import torch."""

import errno
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that does not offer an operation; others, such as EIO and ENOSPC, are faults."""


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
            fsync(file.fileno(), path)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Atomic, as write_json: uncompressed arrays by name, each with a checksum."""
    write_atomic(path, lambda file: np.savez(file, **arrays))


def fsync(descriptor: int, path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable. A file system that does not offer this, such as CIFS and
    some of FUSE for folders, causes one warning."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _warned_of:
            _warned_of.add(device)
            text = f"{path} cannot be synced ({error.strerror}): a power cut may lose the newest files on that disk"
            print(f"warning: {text}", file=sys.stderr, flush=True)


_warned_of: set[int] = set()
"""Devices whose file systems cannot sync."""


def fsync_folder(folder: Path) -> None:
    """Makes created and renamed entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fsync(descriptor, folder)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
