"""Weights of SiT (github.com/willisma/SiT) and REPA's SiT (github.com/sihyun-yu/REPA) as those of our DiT, exactly.

Both have DiT's layers, and one time. Our u(z, r, t | y) = v(z, t | y) for every r: the embedding of t - r ends in
zeros, from which training continues.

                 REPA, and DMF's flow               SiT
    path         z = (1 - t) x + t e, as ours       z = s x + (1 - s) e: s = 1 - t
    output       e - x, as ours                     x - e, and as many channels again, which are not used

Names, and the order of a patch's numbers in the first layer (C, P, P), differ from ours (P, P, C). Positions are not
stored here, but computed: those in a file must equal ours.
"""

import math
import re

import torch
from torch import Tensor

from mf_dist.config.schema import ModelConfig
from mf_dist.models.dit import sine_cosine_positions
from mf_dist.models.layers import TimeEmbedding
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.foreign_weights import ConvertedWeights, checked

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, of SiT-S, B, L and XL; no tensor has their number."""
LAYERS = {
    "x_embedder.proj": "patch_in",
    "t_embedder.mlp.0": "time.fc1",
    "t_embedder.mlp.2": "time.fc2",
    "y_embedder.embedding_table": "label",
    "final_layer.adaLN_modulation.1": "last_modulation",
    "final_layer.linear": "patch_out",
}
BLOCK_LAYERS = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation",
}
REFUSED = {
    r".*\.(q|k)_norm\..*": "its attention normalises queries and keys, which this DiT does not",
    r"logvar_linear\..*": "it is a network of DMF, of which some blocks see t and the others r: this DiT gives every "
    "block t and t - r, and cannot represent it",
}
"""Names of tensors that our DiT has no place for, with the reason."""


def from_sit(tensors: dict[str, Tensor], num_heads: int | None, generator: torch.Generator) -> ConvertedWeights:
    """Weights of SiT as those of our DiT, by u(z, r, t | y) = -v(z, 1 - t | y). generator: for the first layer of the
    embedding of t - r. Raises UserError, without the file's name, for any that our DiT cannot represent."""
    converted = _from_common_layout(tensors, num_heads, generator)
    model, ours = converted.model, converted.tensors
    numbers = model.patch_size**2 * _channels(model)
    has_variance = _rows(ours["patch_out.bias"], numbers, 2 * numbers) == 2 * numbers
    for name in ("patch_out.weight", "patch_out.bias"):
        by_channel = ours[name].unflatten(0, (model.patch_size**2, -1))
        ours[name] = -by_channel[:, : _channels(model)].flatten(0, 1)
    ours["time.fc1.weight"] = _of_reversed_time(ours["time.fc1.weight"])
    left_out = ["final_layer.linear: the second half of its channels"] if has_variance else []
    return ConvertedWeights(model, ours, left_out)


def from_repa(tensors: dict[str, Tensor], num_heads: int | None, generator: torch.Generator) -> ConvertedWeights:
    """Weights of REPA's SiT, without its projectors, as those of our DiT; arguments and errors as from_sit."""
    first_part = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    renamed = {_joined(name, len(first_part)): tensor for name, tensor in tensors.items()}
    converted = _from_common_layout(renamed, num_heads, generator)
    _rows(converted.tensors["patch_out.bias"], converted.model.patch_size**2 * _channels(converted.model))
    return converted


def _from_common_layout(
    tensors: dict[str, Tensor], num_heads: int | None, generator: torch.Generator
) -> ConvertedWeights:
    """What SiT and REPA share; time and output as they are."""
    for name in tensors:
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, name):
                raise UserError(f"it has {name}: {reason}")
    model = _shape(tensors, num_heads)
    layers = LAYERS | {
        f"blocks.{number}.{theirs}": f"blocks.{number}.{ours}"
        for number in range(model.depth)
        for theirs, ours in BLOCK_LAYERS.items()
    }
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}
    del names["y_embedder.embedding_table.bias"]
    left_out = sorted(name for name in tensors if name.startswith("projectors."))
    for name in sorted({*tensors, *names} - {*left_out, "pos_embed"}):
        if name not in tensors or name not in names:
            raise UserError(f"{name} is {'missing' if name in names else 'unexpected'}: not the layers of SiT and DiT")
    ours = {names[name]: checked(name, tensors[name]) for name in names}
    ours["patch_in.weight"] = ours["patch_in.weight"].permute(0, 2, 3, 1).flatten(1).contiguous()
    width = model.hidden_size
    ours["interval.fc1.weight"] = torch.randn(width, TimeEmbedding.num_sinusoids, generator=generator) * 0.02
    ours |= {"interval.fc1.bias": torch.zeros(width), "interval.fc2.weight": torch.zeros(width, width)}
    ours["interval.fc2.bias"] = torch.zeros(width)
    return ConvertedWeights(model, ours, left_out)


def _shape(tensors: dict[str, Tensor], num_heads: int | None) -> ModelConfig:
    """The network's shape, by its first layer, its positions, its labels and the numbers of its blocks."""
    patches, positions, labels = (
        checked(name, tensors.get(name), dimensions)
        for name, dimensions in (
            ("x_embedder.proj.weight", 4),
            ("pos_embed", 3),
            ("y_embedder.embedding_table.weight", 2),
        )
    )
    width, channels, patch, _ = patches.shape
    side = math.isqrt(positions.shape[1])
    expected = sine_cosine_positions(width, side) if width % 4 == 0 else torch.empty(0)
    if positions[0].shape != expected.shape or (positions[0] - expected).abs().max() > 1e-6:
        raise UserError(f"pos_embed of shape {tuple(positions.shape)} differs from the sines and cosines of DiT")
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise UserError(f"width {width} is none of SiT's, and no tensor has the number of heads: give --num-heads")
    if width % heads:
        raise UserError(f"--num-heads {heads} does not divide its width {width}")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return ModelConfig(max(1, depth), width, heads, patch, side * patch, channels, len(labels) - 1)


def _channels(model: ModelConfig) -> int:
    assert model.latent_channels is not None
    return model.latent_channels


def _rows(bias: Tensor, *expected: int) -> int:
    """The number of outputs of the last layer. Raises UserError unless it is an expected one."""
    if len(bias) not in expected:
        raise UserError(
            f"final_layer.linear has {len(bias)} outputs, expected {' or '.join(map(str, expected))}: SiT may predict "
            "a variance, as DiT does, REPA does not"
        )
    return len(bias)


def _of_reversed_time(weight: Tensor) -> Tensor:
    """A layer on [cos(f s), sin(f s)] as one on [cos(f t), sin(f t)], s = 1 - t. With the frequencies f,
    cos(f - f t) = cos f cos f t + sin f sin f t and sin(f - f t) = sin f cos f t - cos f sin f t: a rotation and a
    reflection of each pair."""
    if weight.shape[1] != TimeEmbedding.num_sinusoids:
        raise UserError(f"t_embedder.mlp.0 takes {weight.shape[1]} numbers, expected {TimeEmbedding.num_sinusoids}")
    half = TimeEmbedding.num_sinusoids // 2
    f = torch.exp(-math.log(TimeEmbedding.max_period) / half * torch.arange(half, dtype=torch.float32)).double()
    a, b = weight.double().chunk(2, dim=1)
    return torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1).float()


def _joined(name: str, count: int) -> str:
    """REPA's earlier files number the blocks after the first `count` from 0, as decoder_blocks."""
    match = re.fullmatch(r"decoder_blocks\.(\d+)\.(.*)", name)
    return f"blocks.{int(match[1]) + count}.{match[2]}" if match else name
