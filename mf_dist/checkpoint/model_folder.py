"""A folder that holds one model and nothing of its run, for sampling, measuring, fine-tuning and publishing.

DIR/model.safetensors   one EMA, whose header describes the model (reader.py)
    config.json         the same description, to be read by people
    README.md           model card
    metrics.json        measurements of these weights, if there are any
    samples.png         a grid of samples, if the run has drawn one
    vae/                with the VAE's two files, if they were asked for
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mf_dist.checkpoint.reader import MODEL_CONFIG, MODEL_FILE
from mf_dist.checkpoint.writer import remove_folder, write_tensors
from mf_dist.runtime.atomic_files import fsync_folder, partial_path, write_json
from mf_dist.runtime.errors import UserError


def refuse_unless_new(out: Path) -> None:
    """Raises UserError unless `out` can become a folder: it is missing, or an empty folder."""
    if out.is_symlink() or out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} exists and is no empty folder; remove it, or choose another name")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` at the end, or removed on an error. Raises UserError if `out` holds
    anything."""
    refuse_unless_new(out)
    partial = partial_path(out.absolute())
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_folder(partial)
        os.replace(partial, out)
    except BaseException:
        remove_folder(partial)
        raise
    fsync_folder(out.parent)


def write_model(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the model's two files: fp32 tensors by parameter name, and `state` with the decay of the EMA as "ema"."""
    state = json.loads(json.dumps(state))  # what reading the header gives
    write_tensors(folder / MODEL_FILE, tensors, {"kind": f"ema-{state['ema']}", "state": state})
    write_json(folder / MODEL_CONFIG, state)
