"""Weights of the iMF authors' networks (github.com/Lyy-iiis/imeanflow) as weights of ImfDiT.

This reads the state dict of their PyTorch network (branch torch). It computes the same as the one in JAX (branch main),
where every `weight` of two or more dimensions is a `kernel` with the inputs first: (in, out) for (out, in), and
(P, P, C, D) for the patches' convolution (D, C, P, P). SwiGLU is W2 (silu(W1 x) W3 x) in both; ImfDiT holds W1 above W3
as one matrix, and so q, k and v.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mf_dist.config.schema import ImfDitConfig, ModelConfig
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.foreign_weights import ConvertedWeights, checked

ENDS = {
    "patch_in.weight": "x_embedder.proj.weight",
    "patch_in.bias": "x_embedder.proj.bias",
    "label.weight": "y_embedder.embedding_table._flax_embedding.weight",
    "label.tokens": "class_tokens",
    "u_norm.weight": "u_final_layer.norm.weight",
    "patch_out.weight": "u_final_layer.linear._flax_linear.weight",
    "patch_out.bias": "u_final_layer.linear._flax_linear.bias",
    "v_norm.weight": "v_final_layer.norm.weight",
    "v_patch_out.weight": "v_final_layer.linear._flax_linear.weight",
    "v_patch_out.bias": "v_final_layer.linear._flax_linear.bias",
}
SCALARS = {
    "omega": ("omega_embedder", "omega_tokens"),
    "start": ("cfg_t_start_embedder", "t_min_tokens"),
    "end": ("cfg_t_end_embedder", "t_max_tokens"),
    "time": ("h_embedder", "time_tokens"),
}
IN_SCALAR = {
    "fc1.weight": "mlp.0._flax_linear.weight",
    "fc1.bias": "mlp.0._flax_linear.bias",
    "fc2.weight": "mlp.2._flax_linear.weight",
    "fc2.bias": "mlp.2._flax_linear.bias",
}
BLOCKS = {"blocks": "shared_blocks", "u_blocks": "u_heads", "v_blocks": "v_heads"}
IN_BLOCK = {
    "norm1.weight": ("norm1.weight",),
    "attention.qkv.weight": tuple(f"attn.{part}_proj._flax_linear.weight" for part in "qkv"),
    "attention.q_norm.weight": ("attn.q_norm.weight",),
    "attention.k_norm.weight": ("attn.k_norm.weight",),
    "attention.proj.weight": ("attn.out_proj._flax_linear.weight",),
    "gate1": ("attn_scale",),
    "norm2.weight": ("norm2.weight",),
    "mlp.fc1.weight": ("mlp.w1._flax_linear.weight", "mlp.w3._flax_linear.weight"),
    "mlp.fc2.weight": ("mlp.w2._flax_linear.weight",),
    "gate2": ("mlp_scale",),
}


def from_imf(tensors: Mapping[str, Tensor], num_heads: int | None, generator: torch.Generator) -> ConvertedWeights:
    """Weights of the authors' network, and its shape; the side of the latents, which no tensor has, is taken for 32,
    that of 256 pixels. num_heads and generator are of use to other converters. Raises UserError as from_authors."""
    ours = from_authors(tensors)
    width, channels, patch, _ = _without_prefix(tensors)[ENDS["patch_in.weight"]].shape
    shared, head_depth = (sum(name.startswith(f"{part}.") for name in ours) for part in ("blocks", "u_blocks"))
    norm = ours.get("blocks.0.attention.q_norm.weight")
    if norm is None or not head_depth:
        raise UserError("it has no shared_blocks.0, or no u_heads: not the layers of iMF's network")
    shared, head_depth = shared // len(IN_BLOCK), head_depth // len(IN_BLOCK)
    model = ModelConfig(
        depth=shared + head_depth,
        hidden_size=width,
        num_heads=width // len(norm) if width % len(norm) == 0 else 1,  # 1: load_weights then finds another shape
        patch_size=patch,
        latent_size=32,
        latent_channels=channels,
        num_classes=len(ours["label.weight"]) - 1,
        network="imf_dit",
        imf_dit=ImfDitConfig(head_depth, *(len(ours[f"{name}.tokens"]) for name in ("label", *SCALARS))),
    )
    used = {part for parts in _names(_without_prefix(tensors)).values() for part in parts}
    left_out = [] if "v_norm.weight" in ours else sorted(name for name in used if name.startswith("v_final_layer."))
    return ConvertedWeights(model, ours, left_out)


def from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of ImfDiT, in fp32. Names may begin with `net.`. A network for sampling has no v head: of it such
    files hold the last layers alone, which are left out.

    Raises UserError, without the file's name, for the first tensor that is missing, unexpected, holds no weights, or
    has a shape that cannot be converted. That sizes are those of a network is checked by load_weights."""
    theirs = _without_prefix(tensors)
    names = _names(theirs)
    expected = {part for parts in names.values() for part in parts}
    for name in sorted(expected ^ theirs.keys()):
        raise UserError(f"{name} is {'missing' if name in expected else 'unexpected'}: not the layers of iMF's network")
    ours = {name: _joined([(part, checked(part, theirs[part])) for part in parts]) for name, parts in names.items()}
    convolution = ours["patch_in.weight"]
    if convolution.dim() != 4:
        raise UserError(f"{ENDS['patch_in.weight']} has shape {tuple(convolution.shape)}, not (D, C, P, P)")
    ours["patch_in.weight"] = convolution.permute(0, 2, 3, 1).flatten(1).contiguous()
    if any(name.startswith("v_blocks.") for name in ours):
        return ours
    return {name: tensor for name, tensor in ours.items() if not name.startswith("v_")}


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in tensors.items()}


def _names(theirs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name in ImfDiT -> names of the tensors that are one below the other there, as many blocks as `theirs` has."""
    names: dict[str, tuple[str, ...]] = {ours: (name,) for ours, name in ENDS.items()}
    for ours, (embedder, tokens) in SCALARS.items():
        names |= {f"{ours}.tokens": (tokens,)}
        names |= {f"{ours}.{name}": (f"{embedder}.{part}",) for name, part in IN_SCALAR.items()}
    for ours, blocks in BLOCKS.items():
        for i in sorted({name.split(".")[1] for name in theirs if name.startswith(f"{blocks}.")}):
            names |= {f"{ours}.{i}.{n}": tuple(f"{blocks}.{i}.{p}" for p in parts) for n, parts in IN_BLOCK.items()}
    return names


def _joined(parts: list[tuple[str, Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][1]
    for name, tensor in parts:
        if tensor.dim() != 2 or tensor.shape[1] != parts[0][1].shape[-1]:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, which does not fit {parts[0][0]}")
    return torch.cat([tensor for _, tensor in parts])
