"""Writes checkpoints in the background: training waits only while tensors are gathered into host memory.

Each rank writes its share of the kinds into step-N.tmp/ and leaves KIND.json (size, sha256) beside each once it is on
the disk; rank 0 waits for all of them, then commits: state.json, manifest.json, sync, rename, sync, retention. The
folder is the only thing the ranks' writers share, so no collective runs concurrently with those of training.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_dist.checkpoint.reader import DESCRIPTION, number_of, step_folder, step_folders
from mf_dist.runtime.atomic_files import fsync, fsync_folder, write_json
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.output import complain

CHUNK = 64 << 20
"""Bytes per write, during which other threads run."""


@dataclass(frozen=True)
class WriterRank:
    """Assigns the files of a checkpoint to the ranks that write them."""

    rank: int
    world_size: int

    def writes(self, number: int) -> bool:
        """Whether this rank writes file `number` of a checkpoint."""
        return number % self.world_size == self.rank


class CheckpointWriter:
    """One save at a time. Every rank calls begin, then polls is_running, then reads has_failed and error."""

    def __init__(self, root: Path, writer_rank: WriterRank, retention: "Retention") -> None:
        self.root, self.writer_rank, self.retention = root, writer_rank, retention
        self.error: str | None = None
        """Why the last save failed on this rank; None while it runs and after success."""
        self.committed: Path | None = None
        """The folder of the last save on rank 0; None until it is complete."""
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, step: int) -> str | None:
        """On rank 0, before any rank begins: creates an empty step-N.tmp. Returns an error message, or None."""
        try:
            remove_unfinished(self.root)
            step_folder(self.root, step).with_suffix(".tmp").mkdir(parents=True)
        except OSError as error:
            return self._explain(error)
        return None

    def begin(self, gathered: Iterator[tuple[str, str, Tensor]], kinds: list[str], state: dict[str, Any]) -> None:
        """Consumes (kind, name, tensor), as every rank must since gathering is collective; writes in the background."""
        assert not self.is_running
        own: dict[str, dict[str, Tensor]] = {k: {} for n, k in enumerate(kinds) if self.writer_rank.writes(n)}
        for kind, name, tensor in gathered:
            if kind in own:
                own[kind][name] = tensor.contiguous()
        self.error, self.committed = None, None
        self._cancelled.clear()
        self._thread = threading.Thread(
            target=self._run, args=(own, kinds, state), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def cancel(self) -> None:
        """Called when another rank failed: stops waiting for its files and removes what was written."""
        self._cancelled.set()

    def wait(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def has_failed(self) -> bool:
        """Whether this rank did not do its part of a save that has ended."""
        return self.error is not None or (self.writer_rank.rank == 0 and self.committed is None)

    def _run(self, own: dict[str, dict[str, Tensor]], kinds: list[str], state: dict[str, Any]) -> None:
        folder = step_folder(self.root, state["step"])
        partial = folder.with_suffix(".tmp")
        try:
            for kind in list(own):
                not_finite = [name for name, tensor in own[kind].items() if not tensor.isfinite().all()]
                if not_finite:
                    raise ValueError(f"{kind} of {not_finite[0]} is not finite")
                entry = write_tensors(partial / f"{kind}.safetensors", own.pop(kind), {"kind": kind})
                write_json(partial / f"{kind}.json", entry)
            if self.writer_rank.rank == 0 and self._all_written(partial, kinds):
                commit(partial, folder, kinds, state)
                self.committed = folder
        except BaseException as error:
            self.error = str(error)  # first, since _explain may fail on a broken disk
            self.error = self._explain(error)
        if self.committed:
            self.retention.apply(self.root, folder)
        elif self.writer_rank.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _all_written(self, partial: Path, kinds: list[str]) -> bool:
        while not self._cancelled.is_set():
            if all((partial / f"{kind}.json").is_file() for kind in kinds):
                return True
            time.sleep(0.02)
        return False

    def _explain(self, error: BaseException) -> str:
        try:
            existing = self.root if self.root.is_dir() else self.root.parent
            free = f"{shutil.disk_usage(existing).free >> 20} MiB free there"
        except OSError as other:
            free = f"the disk does not answer ({other.strerror})"
        return f"cannot write a checkpoint to {self.root}: {error}; {free}"


def remove_unfinished(root: Path) -> None:
    """Removes the step-N.tmp folders of interrupted saves."""
    for stale in root.glob("step-*.tmp"):
        remove_folder(stale)


def check_free_space(root: Path, checkpoint_bytes: int) -> None:
    """Raises UserError unless there is room for two checkpoints, existing ones included: the newest stays until the
    next is complete."""
    existing = root
    with suppress(OSError):
        remove_unfinished(root)
    while not existing.is_dir():
        existing = existing.parent
    needed = checkpoint_bytes * max(1, 2 - len(step_folders(root)))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{existing} has {three_digits(free / 2**20)} MiB free, checkpoints need {three_digits(needed / 2**20)} "
            "MiB: make room, or choose another run_dir"
        )


def write_tensors(path: Path, tensors: dict[str, Tensor], description: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes and syncs a safetensors file, with a description for read_description; returns its manifest entry: bytes,
    sha256. (The library's own writer holds the interpreter lock while it writes.)"""
    header: dict[str, Any] = {"__metadata__": {DESCRIPTION: json.dumps(description)}} if description else {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for name in ["", *sorted(tensors)]:
            numbers = tensors[name].reshape(-1).view(torch.uint8).numpy() if name else None
            data = len(text).to_bytes(8, "little") + text if numbers is None else numbers.data
            for start in range(0, len(data), CHUNK):
                file.write(data[start : start + CHUNK])
                digest.update(data[start : start + CHUNK])
        file.flush()
        fsync(file.fileno(), path)
    size = 8 + len(text) + offset
    if path.stat().st_size != size:
        raise OSError(f"{path} has {path.stat().st_size} bytes, {size} were written")
    return {"bytes": size, "sha256": digest.hexdigest()}


def commit(partial: Path, folder: Path, kinds: list[str], state: dict[str, Any]) -> None:
    """Turns a complete step-N.tmp into the checkpoint step-N, atomically."""
    write_json(partial / "state.json", state)
    text = (partial / "state.json").read_bytes()
    files = {"state.json": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    for kind in kinds:
        files[f"{kind}.safetensors"] = json.loads((partial / f"{kind}.json").read_text(encoding="utf-8"))
        (partial / f"{kind}.json").unlink()
    write_json(partial / "manifest.json", {"files": files})
    if folder.exists():
        _check_replaceable(folder, state["step"])
        remove_folder(folder)
    os.replace(partial, folder)
    fsync_folder(folder.parent)


def _check_replaceable(folder: Path, step: int) -> None:
    """Raises ValueError if `folder` holds another step: a person gave it its name. One of the same step is invalid, or
    the run would have resumed from it."""
    try:
        held = json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if held != step:
        raise ValueError(f"{folder} is in the way and holds step {held}; give it another name")


def remove_folder(folder: Path) -> None:
    """Removes a folder with its content, or a link to a folder alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `newest`; those that first passed a multiple of `every_images` (0: none);
    and the one with the lowest metric `best` for the EMA of decay `ema` in `metrics`, a metrics.json of
    tools/fid_eval.py."""

    newest: int
    every_images: int = 0
    best: str | None = None
    metrics: Path | None = None
    ema: str = ""

    def removable(self, folders: list[Path]) -> list[Path]:
        """Those of the step-N folders, given oldest first, that no rule keeps; never the last."""
        scores = self.scores()
        best = min(scores)[1] if scores else None
        candidates = folders[: -max(1, self.newest)]
        return [path for path in candidates if not self._is_milestone(path) and number_of(path) != best]

    def apply(self, root: Path, latest: Path) -> None:
        """Removes old checkpoints after `latest` was committed. What cannot be removed is tried again after the next
        save; an error here does not make the save a failure."""
        try:
            for old in self.removable([path for path in step_folders(root) if number_of(path) <= number_of(latest)]):
                remove_checkpoint(old)
        except Exception as error:
            complain(f"warning: cannot remove older checkpoints ({error!r})")

    def _is_milestone(self, folder: Path) -> bool:
        if not self.every_images:
            return False
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            seen, since = state["samples_seen"], state["samples_seen"] - state["saved_images_ago"]
        except (OSError, ValueError, KeyError):
            return False
        return bool(seen // self.every_images > since // self.every_images)

    def scores(self) -> list[tuple[float, int]]:
        """(value, step) of every measurement of `best` and `ema` with the fewest sampling steps (nfe), sweeps aside. If
        training itself measured, only those measurements: they are comparable with each other."""
        if self.best is None or self.metrics is None or not self.metrics.is_file():
            return []
        try:
            entries = json.loads(self.metrics.read_text(encoding="utf-8"))
            entries = [e for e in entries if e.get("in_training")] or entries
            rows = [
                (int(e["nfe"]), float(e["metrics"][self.best]), int(e["step"]))
                for e in entries
                if self.best in e["metrics"] and "step" in e and e.get("ema") == self.ema and not e.get("sweep")
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        return [(value, step) for nfe, value, step in rows if nfe == min(rows)[0]]


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint after renaming it, so that no partial one keeps its name; on failure it stays."""
    renamed = folder.with_suffix(".tmp")
    try:
        os.replace(folder, renamed)
    except OSError:
        return
    with suppress(OSError):
        remove_folder(renamed)
