"""Checkpoints independent of the world size: full tensors by name in safetensors, JSON beside them, no pickle.

    RUN/checkpoints/step-00001000/
        master.safetensors exp_avg.safetensors exp_avg_sq.safetensors   needed to resume training
        ema-0.9999.safetensors                                          the model to sample from
        state.json       step, samples_seen, config, latent shape, classes, VAE, versions, guard
        manifest.json    size and sha256 of the others, written last

A folder is written as NAME.tmp, synced, then renamed (writer.py): one with a valid manifest is a checkpoint, whatever
its name and place; one without is none.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, is_disk_fault
from mf_dist.runtime.output import complain
from mf_dist.runtime.tensor_file import each_tensor, load_tensors, read_metadata

REQUIRED = ("state.json", "master.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")
"""Files needed to resume, besides at least one EMA."""
DESCRIPTION = "mf_dist"
"""Key in the header of a .safetensors file."""
MODEL_FILE, MODEL_CONFIG, MODEL_VAE = "model.safetensors", "config.json", "vae"
"""Names in a model folder (model_folder.py)."""
STATE = ("step", "samples_seen", "config", "guard")
"""Keys of state.json that resuming needs."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and the content of its state.json."""

    folder: Path
    state: dict[str, Any]
    sha256: str
    """Hash of manifest.json, hence of everything in the folder."""

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def samples_seen(self) -> int:
        return int(self.state["samples_seen"])

    @property
    def vae_folder(self) -> Path | None:
        """The VAE that lies beside the weights; None: there is none."""
        return None

    def ema_decays(self) -> list[str]:
        return sorted(path.stem.removeprefix("ema-") for path in self.folder.glob("ema-*.safetensors"))

    def kinds(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def load(self, kind: str) -> dict[str, Tensor]:
        """Tensors by parameter name; `kind`: master, exp_avg, exp_avg_sq or ema-DECAY."""
        return load_tensors(self.file(kind))

    def file(self, kind: str) -> Path:
        return self.folder / f"{kind}.safetensors"

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, tensor) one by one, so that no whole kind has to fit into memory."""
        return each_tensor(self.file(kind))


@dataclass(frozen=True)
class ExportedEma(Checkpoint):
    """One EMA in the file `folder`, as tools/checkpoint.py export writes it; `state` has its decay as "ema"."""

    @property
    def vae_folder(self) -> Path | None:
        beside = self.folder.with_name(MODEL_VAE)
        return beside if self.folder.name == MODEL_FILE and beside.is_dir() else None

    def ema_decays(self) -> list[str]:
        return [str(self.state["ema"])]

    def kinds(self) -> list[str]:
        return [f"ema-{decay}" for decay in self.ema_decays()]

    def file(self, kind: str) -> Path:
        if kind not in self.kinds():
            raise UserError(f"{self.folder} holds {self.kinds()[0]} alone, not {kind}")
        return self.folder


def read_description(path: Path) -> dict[str, Any]:
    """What training or export wrote into the header of a .safetensors file about it: its `kind`, and an export's
    `state`. Empty for a file of another origin; raises UserError if it is no .safetensors file."""
    try:
        described = json.loads(read_metadata(path).get(DESCRIPTION, "{}"))
    except (ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def open_weights_file(path: Path) -> Checkpoint:
    """An exported EMA, or an EMA's file within a checkpoint. Raises UserError for any other file."""
    kind = path.name.removesuffix(".safetensors")
    if kind.startswith("ema-") and (path.parent / "manifest.json").is_file():
        checkpoint = open_checkpoint(path.parent)
        return ExportedEma(path, {**checkpoint.state, "ema": kind.removeprefix("ema-")}, checkpoint.sha256)
    described = read_description(path)
    state = described.get("state")
    if not isinstance(state, dict) or any(key not in state for key in (*STATE, "ema")):
        what = f"it holds {described['kind']}" if "kind" in described else "it does not describe its model"
        raise UserError(
            f"{path} is not an EMA that tools/checkpoint.py export wrote ({what}): export one, or give a run's folder"
        )
    return ExportedEma(path, state, sha256_of(path))


def open_model_folder(folder: Path) -> Checkpoint:
    """A folder that holds one model. Raises UserError if its two descriptions differ."""
    checkpoint = open_weights_file(folder / MODEL_FILE)
    try:
        shown = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return checkpoint
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {folder / MODEL_CONFIG}: {error}") from None
    if shown != checkpoint.state:
        raise UserError(
            f"{folder / MODEL_CONFIG} differs from the description in {MODEL_FILE}, which counts: restore it, or "
            "remove it"
        )
    return checkpoint


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint of the highest step under `root`, and a warning for each that was skipped before it. Raises
    UserError if none is valid and a disk fault hides one: it may be intact, and a start from scratch would replace
    it."""
    newest: Checkpoint | None = None
    warnings: list[str] = []
    disk_error: UserError | None = None
    for folder in reversed(checkpoint_folders(root)):
        if newest and _likely_step(folder) <= newest.step:
            break
        try:
            checkpoint = open_checkpoint(folder)
        except UserError as error:
            warnings.append(f"passed over a damaged checkpoint: {error}")
            disk_error = error if is_disk_fault(error) else disk_error
            continue
        if newest is None or checkpoint.step > newest.step:
            newest = checkpoint
    if disk_error and newest is None:
        raise disk_error
    return newest, warnings


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Verifies every file's size and sha256 before anything is used; raises UserError with the first that differs.
    verify=False is for the other ranks once one has verified."""
    try:
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items() if verify else ():
            path = folder / Path(name).name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                raise UserError(f"{path} is missing or differs from its manifest; use an older checkpoint")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        missing = [name for name in REQUIRED if name not in entries] + [key for key in STATE if key not in state]
        if missing or not any(name.startswith("ema-") for name in entries):
            raise KeyError(missing[0] if missing else "ema-DECAY.safetensors")
        int(state["step"]), int(state["samples_seen"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a valid checkpoint ({error})") from None
    return Checkpoint(folder, state, sha256_of(folder / "manifest.json"))


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def find_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint folder of any name, an exported EMA, a model folder, or the newest checkpoint of a run folder
    or of a folder of checkpoints, with a warning on stderr for each newer one that is damaged. Raises UserError if none
    is found."""
    if path.is_file():
        return open_weights_file(path)
    if (path / MODEL_FILE).is_file():
        return open_model_folder(path)
    if (path / "manifest.json").is_file():
        return open_checkpoint(path)
    checkpoint, warnings = newest_checkpoint(folder_of_checkpoints(path))
    if checkpoint is None:
        detail = f"; {warnings[0]}" if warnings else ""
        raise UserError(
            f"no checkpoint in {str(path)!r} (expected a folder of a run, checkpoint or model, or an exported EMA)"
            f"{detail}"
        )
    for warning in warnings:
        complain(f"warning: {warning}")
    return checkpoint


def folder_of_checkpoints(path: Path) -> Path:
    """The folder checkpoints/ of a run folder; any other folder itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def step_folders(root: Path) -> list[Path]:
    """step-N folders, named by training, in order of N; without unfinished .tmp ones."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and number_of(path) >= 0), key=number_of)


def checkpoint_folders(root: Path) -> list[Path]:
    """step-N folders, and those of any other name that hold a checkpoint, in order of their steps. One whose name ends
    in .tmp is unfinished."""
    if not root.is_dir():
        return []

    def is_checkpoint(path: Path) -> bool:
        holds_one = path.suffix != ".tmp" and all((path / name).is_file() for name in ("manifest.json", "state.json"))
        return holds_one or (number_of(path) >= 0 and path.is_dir())

    return sorted(filter(is_checkpoint, root.iterdir()), key=lambda path: (_likely_step(path), number_of(path)))


def number_of(folder: Path) -> int:
    """N of a folder step-N; -1 for another name."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits != folder.name and digits.isdecimal() else -1


def _likely_step(folder: Path) -> int:
    """The larger of the step in the name and of that recorded, before anything is verified."""
    try:
        recorded = int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        recorded = -1
    return max(number_of(folder), recorded)
