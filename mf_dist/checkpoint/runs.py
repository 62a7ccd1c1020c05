"""Finds runs and their newest one, and where a checkpoint's measurements belong."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mf_dist.checkpoint.reader import Checkpoint, checkpoint_folders
from mf_dist.runtime.errors import UserError


def folders_below(root: Path) -> Iterator[Path]:
    """`root` and all folders below it, links followed, each folder once: links come last, so that a folder is named by
    its own path if that is below `root`."""
    seen: set[tuple[int, int]] = set()
    pending = deque([root])
    while pending:
        folder = pending.popleft()
        try:
            status = folder.stat()
            children = sorted(path for path in folder.iterdir() if path.is_dir())
        except OSError:  # a broken link, or removed meanwhile
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        pending.extend(path for path in children if path.is_symlink())
        pending.extendleft(path for path in reversed(children) if not path.is_symlink())


def newest_run(root: Path) -> Path:
    """The run under `root` with a checkpoint whose training command wrote its status last. Raises UserError if there
    is none."""
    runs = [folder for folder in folders_below(root) if checkpoint_folders(folder / "checkpoints")]
    if not runs:
        raise UserError(f"no trained run under {str(root)!r}; train one, or give --checkpoint DIR")
    return max(runs, key=_last_trained)


def _last_trained(run: Path) -> float:
    """Time of status.json, seconds since the epoch, which later changes of the folder do not move; of checkpoints/ if
    there is none, or if it records a call that was refused."""
    try:
        entry = json.loads((run / "status.json").read_text(encoding="utf-8"))
        if not entry.get("refused"):
            return float(entry["time"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return (run / "checkpoints").stat().st_mtime


def evaluation_folder(checkpoint: Checkpoint) -> Path | None:
    """RUN/eval of a checkpoint in RUN/checkpoints; None for one that lies elsewhere."""
    for folder in (checkpoint.folder, checkpoint.folder.resolve()):
        if folder.parent.name == "checkpoints":
            return folder.parent.parent / "eval"
    return None
