"""Compatibility of a run's config with its checkpoint, and which EMA of a checkpoint is used."""

from typing import Any

from mf_dist.checkpoint.reader import Checkpoint
from mf_dist.config.loader import from_tree, to_tree
from mf_dist.config.objectives import OBJECTIVES, Objective
from mf_dist.config.schema import Config
from mf_dist.runtime.errors import UserError

TRAINING_SECTIONS = ("model", *OBJECTIVES, "optim", "dataset")
"""Sections in which every key affects training."""
TRAINING_KEYS = (
    *("data.flip", "data.normalisation", "data.normalisation_mean", "data.normalisation_std"),
    *("train.batch_size", "train.seed", "engine.precision", "engine.jvp_precision"),
)
FIXED_SECTIONS = ("model",)
"""Sections that can never change, since the weights would not fit."""


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) of every value that differs between two nested dicts."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[prefix + key] = (a, b)
    return changed


def changes_training(key: str, objective: Objective) -> bool:
    if key == "train.total_images":
        return objective.follows_progress
    return key.split(".")[0] in TRAINING_SECTIONS or key in TRAINING_KEYS


def check_config_changes(checkpoint: Checkpoint, now: dict[str, Any], allowed: bool) -> list[str]:
    """A line for every difference in config, dataset and versions between the checkpoint and `now`. Raises UserError
    for a change that affects training, unless allowed, and for one in FIXED_SECTIONS."""
    state, lines = checkpoint.state, []
    saved = from_tree(Config, state["config"], f"{checkpoint.folder}/state.json")
    before = {**to_tree(saved), "dataset": {"sha256": state.get("dataset", {}).get("sha256")}}
    after = {**now["config"], "dataset": {"sha256": now["dataset"]["sha256"]}}
    for key, (old, new) in differences(before, after).items():
        if key.split(".")[0] in FIXED_SECTIONS:
            raise UserError(f"{checkpoint.folder} has {key}={old}, now it is {new}: choose another run_dir")
        if changes_training(key, saved.objective) and not allowed:
            raise UserError(
                f"this run was trained with {key}={old}, now it is {new}; restore it, choose another run_dir, or "
                "accept the change with --allow-config-change"
            )
        lines.append(f"config changed: {key} {old} -> {new}")
    for key, (old, new) in differences(state.get("versions", {}), now["versions"]).items():
        lines.append(f"warning: {key} was {old}, now it is {new}; the numbers may differ")
    return lines


def measured_ema_decays(config: Config) -> tuple[float, ...]:
    """Decays of the EMAs measured during training; the first one selects the best checkpoint."""
    return config.eval.training_emas or config.optim.ema_decay[:1]


def first_ema_decay(checkpoint: Checkpoint) -> str:
    """Decay of the EMA from which samples are drawn."""
    decays = checkpoint.ema_decays()
    if not decays:
        raise UserError(f"{checkpoint.folder} holds no EMA")
    config = from_tree(Config, checkpoint.state.get("config"), f"{checkpoint.folder}/state.json")
    first = str(config.optim.ema_decay[0])
    return first if first in decays else decays[0]
