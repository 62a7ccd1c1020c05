"""Where a run's state comes from: its newest valid checkpoint, else init_from, else nothing; and whether what is asked
now fits what was saved."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mf_dist.checkpoint.reader import Checkpoint, find_checkpoint, load_tensors
from mf_dist.config.loader import from_tree, to_tree
from mf_dist.config.schema import Config
from mf_dist.runtime.errors import UserError

TRAINING_SECTIONS = ("model", "meanflow", "optim", "dataset")
"""Sections of which every key changes what is trained."""
TRAINING_KEYS = ("data.flip", "train.batch_size", "train.seed", "engine.precision", "engine.jvp_precision")
FIXED_SECTIONS = ("model",)
"""Sections that no flag can change: the weights would not fit."""


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) of every value that differs between two nested dicts."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def changes_training(key: str) -> bool:
    return key.split(".")[0] in TRAINING_SECTIONS or key in TRAINING_KEYS


def check_config_changes(checkpoint: Checkpoint, now: dict[str, Any], allowed: bool) -> list[str]:
    """A line for every difference between the checkpoint's config, dataset and surroundings and those of `now`.
    UserError where one changes the mathematics and is not allowed, or can never be."""
    state, lines = checkpoint.state, []
    saved = to_tree(from_tree(Config, state["config"], f"{checkpoint.folder}/state.json"))
    before = {**saved, "dataset": {"sha256": state.get("dataset", {}).get("sha256")}}
    asked = {**now["config"], "dataset": {"sha256": now["dataset"]["sha256"]}}
    for key, (old, new) in differences(before, asked).items():
        if key.split(".")[0] in FIXED_SECTIONS:
            raise UserError(f"{checkpoint.folder} has {key}={old}, now it is {new}: choose another run_dir")
        if changes_training(key) and not allowed:
            raise UserError(
                f"this run was trained with {key}={old}, now it is {new}; go back to that, choose another run_dir, or "
                "go on with the change by --allow-config-change"
            )
        lines.append(f"config changed: {key} {old} -> {new}")
    for key, (old, new) in differences(state.get("versions", {}), now["versions"]).items():
        lines.append(f"warning: {key} was {old}, now it is {new}; the numbers may differ")
    return lines


def load_initial_weights(net: nn.Module, source: str) -> str:
    """Puts the weights that `train.init_from` names into `net`; returns what they are. UserError where they do not
    fit."""
    path = Path(source)
    if path.suffix == ".safetensors":
        tensors, name = load_tensors(path), str(path)
    else:
        checkpoint = find_checkpoint(path)
        decay = first_ema_decay(checkpoint)
        tensors, name = checkpoint.load(f"ema-{decay}"), f"{checkpoint.folder}, its EMA of decay {decay}"
    _check_fit(dict(net.named_parameters()), tensors, name)
    net.load_state_dict(tensors)
    return name


def measured_ema_decays(config: Config) -> tuple[float, ...]:
    """Of the EMAs that are measured during training; the first decides which checkpoint is the best."""
    return config.eval.training_emas or config.optim.ema_decay[:1]


def first_ema_decay(checkpoint: Checkpoint) -> str:
    """Of the EMA that a run draws its samples from."""
    decays = checkpoint.ema_decays()
    if not decays:
        raise UserError(f"{checkpoint.folder} holds no EMA")
    config = from_tree(Config, checkpoint.state.get("config"), f"{checkpoint.folder}/state.json")
    first = str(config.optim.ema_decay[0])
    return first if first in decays else decays[0]


def _check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    for key in sorted({*wanted, *found}):
        if key not in found or key not in wanted:
            raise UserError(
                f"train.init_from {name}: {key} is {'missing' if key in wanted else 'too much'}; "
                "it is a model of another shape"
            )
        if wanted[key].shape != found[key].shape:
            raise UserError(
                f"train.init_from {name}: {key} has shape {tuple(found[key].shape)}, "
                f"this model needs {tuple(wanted[key].shape)}"
            )
