"""Copies shards close to the readers: random reads of 16 KB from a shared disk would starve the first epoch.

One process per machine reads every shard once, in order: into the page cache if `stage_dir` is None, else into that
folder on the local disk, verified by sha256 and renamed when complete. Readers use the copy of a shard as soon as it
exists, and the shared disk until then. Batches are the same either way.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mf_dist.runtime.atomic_files import fsync, partial_path, sha256_of
from mf_dist.runtime.figures import three_digits

CHUNK = 16 << 20


class Staging:
    """Stages in its own thread; passes progress and errors to `log`. Never ends a run."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stage_dir: Path | None, log: Callable[[str], None]):
        self.folder, self.manifest, self.stage_dir, self._log = folder, manifest, stage_dir, log
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        shards = self.manifest["shards"]
        try:
            if self.stage_dir is not None:
                check_free_space(self.stage_dir, self.manifest)
            for number, shard in enumerate(shards, 1):
                self._stage(shard)
                if number % max(1, len(shards) // 10) == 0 or number == len(shards):
                    where = self.stage_dir or "the page cache"
                    self._log(f"staged {number} of {len(shards)} shards in {where}")
        except OSError as error:
            self._log(f"warning: staging stopped ({error}); reading from {self.folder}")

    def _stage(self, shard: dict[str, Any]) -> None:
        source = self.folder / shard["name"]
        if self.stage_dir is None:
            for _ in _chunks(source):
                pass
            return
        target = staged_path(self.stage_dir, shard)
        if is_staged(target, shard) and sha256_of(target) == shard["sha256"]:
            return
        partial = partial_path(target)
        try:
            with open(partial, "wb") as file:
                for chunk in _chunks(source):
                    file.write(chunk)
                file.flush()
                fsync(file.fileno(), partial)
            if sha256_of(partial) != shard["sha256"]:
                raise OSError(f"{source} has another sha256 than the manifest; run tools/latents.py verify")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def check_free_space(stage_dir: Path, manifest: dict[str, Any]) -> None:
    """Creates `stage_dir`; raises OSError unless the shards that it does not hold yet fit."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    missing = [s for s in manifest["shards"] if not is_staged(staged_path(stage_dir, s), s)]
    needed, free = sum(s["bytes"] for s in missing), shutil.disk_usage(stage_dir).free
    if free < needed:
        raise OSError(
            f"{stage_dir} has {three_digits(free / 2**30)} GiB free, the shards need {three_digits(needed / 2**30)}"
        )


def is_staged(target: Path, shard: dict[str, Any]) -> bool:
    """Whether a copy of the right size exists; a power cut may have left an empty one."""
    return target.is_file() and target.stat().st_size == shard["bytes"]


def staged_path(stage_dir: Path, shard: dict[str, Any]) -> Path:
    """Named by content, so that datasets can share a folder and no outdated copy is read."""
    return stage_dir / f"{shard['sha256']}.tar"


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk
