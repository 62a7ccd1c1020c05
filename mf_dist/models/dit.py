"""DiT as the average velocity u(z, r, t | y) (arXiv 2212.09748 with MeanFlow's conditioning on (t, t - r)).

Differences from DiT: raw times in [0, 1]; two time embeddings, of t and of t - r; an additional label, the null
class; no predicted variance; every layer also returns a tangent if it gets one (layers.py).
All modulations and the last linear start at 0, so u = 0 and du/dt = 0 at initialisation.

Shapes: B rows, C latent channels, S latent side, P patch side, N = (S/P)^2 tokens, D width.
"""

import torch
from torch import Tensor, nn

from mf_dist.models.attention import SelfAttention
from mf_dist.models.layers import Dual, Linear, Mlp, TimeEmbedding, gated_add, layer_norm, modulate, silu
from mf_dist.models.network import Branch, Network, Tangent


class Block(nn.Module):
    """adaLN-zero transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.mlp = Mlp(width, 4 * width)
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, dx: Tensor | None, dc: Tensor | None) -> Dual:
        """x, dx (B, N, D); c, dc (B, D), already through SiLU."""
        m, dm = self.modulation(c, dc)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        dshift1, dscale1, dgate1, dshift2, dscale2, dgate2 = dm.chunk(6, dim=-1) if dm is not None else [None] * 6
        h, dh = layer_norm(x, dx)
        h, dh = self.attention(*modulate(h, shift1, scale1, dh, dshift1, dscale1))
        x, dx = gated_add(x, gate1, h, dx, dgate1, dh)
        h, dh = layer_norm(x, dx)
        h, dh = self.mlp(*modulate(h, shift2, scale2, dh, dshift2, dscale2))
        return gated_add(x, gate2, h, dx, dgate2, dh)


class DiT(Network):
    """u(z, r, t | y) for square latents. With num_classes = 0 only the null class is left: unconditional."""

    def __init__(
        self,
        *,
        latent_size: int,
        latent_channels: int,
        num_classes: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(latent_size, latent_channels, num_classes, patch_size)
        patch_numbers = patch_size * patch_size * latent_channels
        self.patch_in = Linear(patch_numbers, hidden_size)
        self.time = TimeEmbedding(hidden_size)
        self.interval = TimeEmbedding(hidden_size)
        self.label = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.last_modulation = Linear(hidden_size, 2 * hidden_size)
        self.patch_out = Linear(hidden_size, patch_numbers)
        self.positions: Tensor
        self.register_buffer("positions", sine_cosine_positions(hidden_size, self.tokens_per_side), persistent=False)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform linears; N(0, 0.02) for time MLPs and labels; zero modulations and last linear."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for weight in (self.time.fc1, self.time.fc2, self.interval.fc1, self.interval.fc2, self.label):
            nn.init.normal_(weight.weight, std=0.02, generator=generator)
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for layer in [self.last_modulation, self.patch_out, *(block.modulation for block in blocks)]:
            nn.init.zeros_(layer.weight)

    def branches(self) -> list[Branch]:
        return [Branch(list(self.blocks), [self.last_modulation], self.patch_out)]

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        tangent: Tangent | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """z (B, C, S, S), r and t (B,) with 0 <= r <= t <= 1, y (B,) in [0, num_classes], num_classes = null.

        Returns u like z; with a tangent (dz, dr, dt), the pair (u, du) with du = d/ds u((z, r, t) + s tangent).
        The layers compute in `dtype`; None: in that of the weights, or with a tangent in tangent_dtype. u and du have
        the dtype of z."""
        x, c, dx, dc = self.embed(z, r, t, y, tangent, self.compute_dtype(dtype, tangent))
        for block in self.blocks:
            x, dx = self.run_block(block, x, c, dx, dc)
        u, du = self.output(x, c, dx, dc)
        return u.to(z.dtype) if du is None else (u.to(z.dtype), du.to(z.dtype))

    def embed(
        self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, tangent: Tangent | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Before the blocks: tokens x (B, N, D), condition c (B, D), and their tangents."""
        dz, dr, dt = tangent if tangent is not None else (None, None, None)
        x, dx = self.patch_in(self._patchify(z).to(dtype), None if dz is None else self._patchify(dz).to(dtype))
        x = x + self.positions.to(dtype)
        c, dc = self._condition(r, t, y, dr, dt, dtype)
        return x, c, dx, dc

    def output(self, x: Tensor, c: Tensor, dx: Tensor | None, dc: Tensor | None) -> Dual:
        """After the blocks: u (B, C, S, S) and its tangent."""
        m, dm = self.last_modulation(c, dc)
        h, dh = layer_norm(x, dx)
        shift, scale = m.chunk(2, dim=-1)
        dshift, dscale = dm.chunk(2, dim=-1) if dm is not None else (None, None)
        out, dout = self.patch_out(*modulate(h, shift, scale, dh, dshift, dscale))
        return self._unpatchify(out), None if dout is None else self._unpatchify(dout)

    def _condition(
        self, r: Tensor, t: Tensor, y: Tensor, dr: Tensor | None, dt: Tensor | None, dtype: torch.dtype
    ) -> Dual:
        """SiLU(time(t) + interval(t - r) + label(y)), (B, D)."""
        a, da = self.time(t, dt, dtype)
        b, db = self.interval(t - r, None if dt is None or dr is None else dt - dr, dtype)
        return silu(a + b + self.label(y).to(dtype), None if da is None or db is None else da + db)


def sine_cosine_positions(width: int, side: int) -> Tensor:
    """Fixed 2-D embedding (side * side, width): half the width for columns, half for rows, as in MAE and DiT."""
    frequency = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (side, width / 2)
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, width).float()
