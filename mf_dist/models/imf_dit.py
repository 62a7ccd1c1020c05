"""The network of improved MeanFlow (iMF, arXiv 2512.02012): u(z, r, t | y, guidance) and v(z, t | y, guidance).

Differences from dit.py: what the network is told are tokens before those of the patches, not modulations; of the times
it sees t - r alone (arXiv 2502.13129); the guidance (scale and interval) is an input. Blocks are those of language
models: RMSNorm, normalised q and k, rotary positions over the whole sequence, SwiGLU. A trunk of blocks is shared by a
u head and a v head; the velocity v, of which sampling needs nothing, gives the training target its direction.
Gates and last linears start at 0, so u, du/dt and v are 0 at initialisation.

Shapes: B rows, C latent channels, S latent side, P patch side, N_p = (S/P)^2 patches, N = N_c + N_p tokens with N_c for
the conditions, D width, H heads, K = D/H.
"""

from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mf_dist.models.attention import RotaryAttention
from mf_dist.models.layers import Dual, Linear, RmsNorm, SwiGlu, TimeEmbedding, rotary_angles
from mf_dist.models.network import Branch, Network, Tangent


class Guidance(NamedTuple):
    """Classifier-free guidance of each row: scale omega >= 1 inside start <= t <= end, 1 outside. fp32, (B,)."""

    omega: Tensor
    start: Tensor
    end: Tensor


class ScalarTokens(TimeEmbedding):
    """A number as `count` tokens: learned ones, to each of which the number's embedding is added."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width)
        self.tokens = nn.Parameter(torch.empty(count, width))

    def forward(self, t: Tensor, dt: Tensor | None, dtype: torch.dtype) -> Dual:
        """t, dt (B,) -> (B, count, D) in `dtype`."""
        c, dc = super().forward(t, dt, dtype)
        tokens = self.tokens.to(dtype) + c.unsqueeze(1)
        return tokens, None if dc is None else dc.unsqueeze(1).expand_as(tokens)


class LabelTokens(nn.Embedding):
    """A label as `count` tokens: learned ones, to each of which the label's vector is added."""

    def __init__(self, num_labels: int, width: int, count: int) -> None:
        super().__init__(num_labels, width)
        self.tokens = nn.Parameter(torch.empty(count, width))

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """y (B,) -> (B, count, D) in `dtype`."""
        return self.tokens.to(dtype) + super().forward(y).to(dtype).unsqueeze(1)


def gated_add(x: Tensor, gate: Tensor, h: Tensor, dx: Tensor | None, dh: Tensor | None) -> Dual:
    """The residual y = x + gate h: x and h (B, N, D), gate (D,) a weight."""
    gate = gate.to(x.dtype)
    return x + gate * h, None if dx is None or dh is None else dx + gate * dh


class Block(nn.Module):
    """Pre-norm transformer block whose two residuals have gates, one number per feature, that start at 0."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = RmsNorm(width), RotaryAttention(width, num_heads)
        self.norm2, self.mlp = RmsNorm(width), SwiGlu(width)
        self.gate1, self.gate2 = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dx: Tensor | None) -> Dual:
        """x, dx (B, N, D); cos, sin (N, K/2) of the positions."""
        h, dh = self.norm1(x, dx)
        h, dh = self.attention(h, cos, sin, dh)
        x, dx = gated_add(x, self.gate1, h, dx, dh)
        h, dh = self.mlp(*self.norm2(x, dx))
        return gated_add(x, self.gate2, h, dx, dh)


class ImfDiT(Network):
    """u(z, r, t | y, guidance) and v for square latents. v_head: whether it has the v head, which only training needs.
    With num_classes = 0 only the null class is left: unconditional."""

    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("v_blocks.", "v_norm.", "v_patch_out.")

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
        head_depth: int,
        class_tokens: int,
        guidance_tokens: int,
        start_tokens: int,
        end_tokens: int,
        time_tokens: int,
        generator: torch.Generator,
        v_head: bool = True,
    ) -> None:
        super().__init__(latent_size, latent_channels, num_classes, patch_size)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(hidden_size, num_heads) for _ in range(count))

        patch_numbers = patch_size * patch_size * latent_channels
        self.num_condition_tokens = class_tokens + guidance_tokens + start_tokens + end_tokens + time_tokens
        self.head_size = hidden_size // num_heads
        self.patch_in = Linear(patch_numbers, hidden_size)
        self.label = LabelTokens(num_classes + 1, hidden_size, class_tokens)
        self.omega = ScalarTokens(hidden_size, guidance_tokens)
        self.start = ScalarTokens(hidden_size, start_tokens)
        self.end = ScalarTokens(hidden_size, end_tokens)
        self.time = ScalarTokens(hidden_size, time_tokens)
        self.blocks = blocks(depth - head_depth)
        self.u_blocks = blocks(head_depth)
        self.u_norm, self.patch_out = RmsNorm(hidden_size), Linear(hidden_size, patch_numbers)
        if v_head:
            self.v_blocks = blocks(head_depth)
            self.v_norm, self.v_patch_out = RmsNorm(hidden_size), Linear(hidden_size, patch_numbers)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """As the authors': N(0, 1/fan_in) in the embeddings of numbers, N(0, 1/D) for tokens and labels, in the blocks
        N(0, (0.32)^2/fan_in); Xavier-uniform for the patches; zero biases and last linears."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = 0.32 if "blocks." in name else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LabelTokens):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=generator)
            if isinstance(module, LabelTokens | ScalarTokens):
                nn.init.normal_(module.tokens, std=module.tokens.shape[1] ** -0.5, generator=generator)
        nn.init.xavier_uniform_(self.patch_in.weight, generator=generator)
        for branch in self.branches():
            nn.init.zeros_(branch.last_linear.weight)

    @property
    def has_v_head(self) -> bool:
        return hasattr(self, "v_blocks")

    def branches(self) -> list[Branch]:
        u = Branch([*self.blocks, *self.u_blocks], [self.u_norm], self.patch_out)
        return [u, Branch([*self.v_blocks], [self.v_norm], self.v_patch_out)] if self.has_v_head else [u]

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        guidance: Guidance,
        tangent: Tangent | None = None,
        dtype: torch.dtype | None = None,
        head: Literal["u", "v", "both"] = "u",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """z (B, C, S, S), r and t (B,) with 0 <= r <= t <= 1, y (B,) in [0, num_classes], num_classes = null.

        head: u gives u like z, and with a tangent (dz, dr, dt) the pair (u, du), du = d/ds u((z, r, t) + s tangent);
        v gives the velocity alone, without the u head's work; both gives (u, v). v and both take no tangent. The
        layers compute in `dtype`; None: in that of the weights, or with a tangent in tangent_dtype. Results have the
        dtype of z."""
        assert head == "u" or (tangent is None and self.has_v_head), f"no {head} of this network"
        x, dx = self.embed(z, r, t, y, guidance, tangent, self.compute_dtype(dtype, tangent))
        cos, sin = rotary_angles(x.shape[1], self.head_size, z)
        x, dx = self._run(self.blocks, x, cos, sin, dx)
        if head == "v":
            return self._v(x, cos, sin).to(z.dtype)
        u, du = self.output(self.u_norm, self.patch_out, *self._run(self.u_blocks, x, cos, sin, dx))
        if head == "both":
            return u.to(z.dtype), self._v(x, cos, sin).to(z.dtype)
        return u.to(z.dtype) if du is None else (u.to(z.dtype), du.to(z.dtype))

    def embed(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        guidance: Guidance,
        tangent: Tangent | None,
        dtype: torch.dtype,
    ) -> Dual:
        """Before the blocks: tokens (B, N, D) of class, omega, start, end, t - r and patches, and their tangent."""
        dz, dr, dt = tangent if tangent is not None else (None, None, None)
        omega, start, end = guidance
        conditions = [
            self.label(y, dtype),
            self.omega(1 - 1 / omega, None, dtype)[0],
            self.start(start, None, dtype)[0],
            self.end(end, None, dtype)[0],
        ]
        time, dtime = self.time(t - r, None if dt is None or dr is None else dt - dr, dtype)
        x, dx = self.patch_in(self._patchify(z).to(dtype), None if dz is None else self._patchify(dz).to(dtype))
        x = torch.cat([*conditions, time, x], dim=1)
        if dx is None:
            return x, None
        return x, torch.cat([*(torch.zeros_like(c) for c in conditions), dtime, dx], dim=1)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, cos: Tensor, sin: Tensor, dx: Tensor | None) -> Dual:
        for block in blocks:
            x, dx = self.run_block(block, x, cos, sin, dx)
        return x, dx

    def _v(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.output(self.v_norm, self.v_patch_out, *self._run(self.v_blocks, x, cos, sin, None))[0]

    def output(self, norm: RmsNorm, linear: Linear, x: Tensor, dx: Tensor | None) -> Dual:
        """After the blocks of a head: its patches (B, C, S, S) and their tangent."""
        n = self.num_condition_tokens
        out, dout = linear(*norm(x[:, n:], None if dx is None else dx[:, n:]))
        return self._unpatchify(out), None if dout is None else self._unpatchify(dout)
