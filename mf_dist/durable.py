"""Files that are there, whole, after a power cut. No torch."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def partial_path(path: Path) -> Path:
    """Where to write what will be renamed to `path`: a name that nobody else has, on any machine."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Atomic: the file is the old one or the new one, whatever happens."""
    partial = partial_path(path)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
