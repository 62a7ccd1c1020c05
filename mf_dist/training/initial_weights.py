"""Weights from which a run starts, train.init_from: as many of another model's as fit the data of this one."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mf_dist.checkpoint.reader import find_checkpoint, read_description
from mf_dist.config.loader import from_tree
from mf_dist.config.schema import Config
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.tensor_file import load_tensors
from mf_dist.runtime.weights import DTYPES, load_weights
from mf_dist.training.optimizer import MOMENTS
from mf_dist.training.resume import first_ema_decay

SMALLEST_WEIGHTS = 0.05
"""Median size of a network's matrices, relative to their initial ones, below which a file holds no weights. For moments
of gradients it is about 0.001, for trained weights about 1 (measured on the digits)."""
LABELS = "label.weight"
"""The rows of the classes, and of the null class as the last."""
PATCH_IN = "patch_in.weight"
PATCH_LAYERS = ("patch_in.", "patch_out.", "v_patch_out.")
"""Beginnings of the names of layers that read or write patches."""


def load_initial_weights(net: nn.Module, config: Config, classes: list[str]) -> list[str]:
    """Loads the weights that `train.init_from` names into `net`, which has its initial ones and keeps those of layers
    that depend on the data, where the data differ. classes: the dataset's names, possibly none. Returns lines for the
    log. Raises UserError if they do not fit or are no weights."""
    assert config.train.init_from is not None
    tensors, name, state = _read(Path(config.train.init_from))
    where = f"train.init_from {name}"
    source = from_tree(Config, state["config"], where) if "config" in state else None
    if source and source.model.network != config.model.network:
        raise UserError(f"{where}: a network of model.network={source.model.network}, not {config.model.network}")
    lines = [f"initial weights: {name}"]
    lines += _start_v_head(net, tensors)  # first: its last layer may then be one of the new patch layers
    lines += _keep_patch_layers(net, tensors, config, source)
    lines += _match_labels(net, tensors, classes, state.get("classes", []))
    if source and source.model.latent_size != config.model.latent_size:
        sizes = source.model.latent_size, config.model.latent_size
        lines.append(f"initial weights: positions are computed for latents of {sizes[1]}, the source's were {sizes[0]}")
    if source and _normalisation(source) != _normalisation(config):
        lines.append(
            f"warning: {name} was trained with {_normalisation(source)}, this run has {_normalisation(config)}: its "
            "weights expect other numbers, unless this run gets the source's settings"
        )
    initial = _sizes(net)
    load_weights(net, tensors, where)
    ratios = {key: size / initial[key] for key, size in _sizes(net).items() if initial[key]}
    middle = sorted(ratios, key=lambda key: ratios[key])[len(ratios) // 2]
    if ratios[middle] < SMALLEST_WEIGHTS:
        raise UserError(
            f"{where}: {middle} has {ratios[middle]:.1e} of the size of initial weights, half of the others less: "
            "these are moments of an optimizer, not weights"
        )
    return lines


def _read(path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Tensors, how to name them, and what is known of their model: nothing for a file of another program."""
    if path.is_dir() or path.suffix != ".safetensors":
        checkpoint = find_checkpoint(path)
        decay = first_ema_decay(checkpoint)
        return checkpoint.load(f"ema-{decay}"), f"{checkpoint.folder}, its EMA of decay {decay}", checkpoint.state
    tensors, described = load_tensors(path), read_description(path)
    if described.get("kind") in MOMENTS:
        raise UserError(
            f"train.init_from {path}: its {next(iter(tensors))} is {described['kind']} of an optimizer, not a weight"
        )
    state = described.get("state")
    return tensors, str(path), state if isinstance(state, dict) else {}


def _keep_patch_layers(net: nn.Module, tensors: dict[str, Tensor], config: Config, source: Config | None) -> list[str]:
    """Where latents have other channels, or patches another side, the layers that read and write patches stay new."""
    own, theirs = net.state_dict(), tensors.get(PATCH_IN)
    if source:
        differs = _patch(source) != _patch(config)
    else:
        shape = own[PATCH_IN].shape
        differs = theirs is not None and theirs.dim() == 2 and len(theirs) == shape[0] and theirs.shape != shape
    if not differs:
        return []
    tensors |= {key: tensor for key, tensor in own.items() if key.startswith(PATCH_LAYERS)}
    side, channels = _patch(config)
    before = "{} of {} channels".format(*_patch(source)) if source else "of another size"
    return [
        f"initial weights: the patch layers are new, for patches of {side} of {channels} channels; the source's were "
        f"{before}"
    ]


def _start_v_head(net: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """A velocity head that the source lacks, as one for sampling does, begins as a copy of the u head."""
    names = {"v_blocks.": "u_blocks.", "v_norm.": "u_norm.", "v_patch_out.": "patch_out."}
    sources = {key: key.replace(v, u, 1) for key in net.state_dict() for v, u in names.items() if key.startswith(v)}
    if not sources or any(key in tensors for key in sources):
        return []
    tensors |= {key: tensors[source].clone() for key, source in sources.items() if source in tensors}
    return ["initial weights: the source has no v head, which starts as a copy of the u head"]


def _match_labels(net: nn.Module, tensors: dict[str, Tensor], classes: list[str], known: list[str]) -> list[str]:
    """Where the classes differ, those of the same name keep their row, as does the null class; the others are new. If
    one side has no names, rows are kept if there are as many, else all are new."""
    own, theirs = net.state_dict()[LABELS].clone(), tensors.get(LABELS)
    if theirs is None or theirs.shape[1:] != own.shape[1:] or theirs.dtype not in DTYPES or not len(theirs):
        return []  # load_weights says what is wrong
    are_named = len(classes) == len(own) - 1 and len(known) == len(theirs) - 1
    if are_named and known == classes:
        return []
    if not are_named and len(theirs) == len(own):
        count = len(theirs) - 1
        line = f"initial weights: the source's {count:,} classes are kept by number: they have no names to compare"
        return [line] if count else []
    rows = {name: row for row, name in enumerate(known)} if are_named else {}
    matched = [number for number, name in enumerate(classes) if name in rows]
    for number in matched:
        own[number] = theirs[rows[classes[number]]]
    own[-1] = theirs[-1]
    tensors[LABELS] = own
    return [
        f"initial weights: of {len(own) - 1:,} classes, {len(matched):,} have the row of the same name among the "
        f"source's {len(theirs) - 1:,}, the others are new; the null class has the source's"
    ]


def _patch(config: Config) -> tuple[int, int | None]:
    return config.model.patch_size, config.model.latent_channels


def _normalisation(config: Config) -> str:
    data = config.data
    numbers = f" by mean {data.normalisation_mean} and std {data.normalisation_std}"
    return f"data.normalisation={data.normalisation}" + (numbers if data.normalisation_mean is not None else "")


def _sizes(net: nn.Module) -> dict[str, float]:
    """Root mean square of each matrix."""
    return {key: p.detach().square().mean().sqrt().item() for key, p in net.named_parameters() if p.dim() > 1}
