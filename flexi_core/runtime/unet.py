"""The embedded U-Net: LDM layout and ComfyUI's own key names (Rombach et al., 2022).

Blocks are the ordered lists `input_blocks`, `middle_block`, `output_blocks`; `output_blocks[n-1-i]` takes the skip of
`input_blocks[i]`. The same weights load in the host's own `UNetModel`, and `_forward` honours the host's
`output_block_patch`, so that one partial-step implementation (`flexi_core.networks.unet`) serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

GROUPS = 32  # fixed in the LDM layout


def _layout(channels: int) -> int:
    return GROUPS


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Return sinusoidal embeddings [B, dim] of timesteps [B], 0..999 (Vaswani et al., 2017)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in order; a layer gets what it takes: the timestep embedding, the context, or the size of the next skip."""

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None, size: torch.Size | None = None
    ) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions; the timestep scales and shifts the features between them (Dhariwal and Nichol, 2021), or only shifts.

    Args:
        channels, emb_channels, out_channels: of the features, of the timestep's embedding, of the result.
        scale_shift: scale and shift after the normalisation; otherwise shift before it.
        groups: returns how many groups channels are normalised in.
    """

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, scale_shift: bool, groups: Callable[[int], int] = _layout
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups(channels), channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups(out_channels), out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),  # holds the layout's numbering: the convolution is out_layers.3
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        emb = self.emb_layers(emb)[..., None, None]
        if not self.scale_shift:
            return self.skip_connection(x) + self.out_layers(self.in_layers(x) + emb)
        scale, shift = emb.chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class CrossAttention(nn.Module):
    """Multi-head attention from x [B, N, C] to context [B, M, D], or to x itself."""

    def __init__(self, query_dim: int, context_dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, query_dim), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """Gated GELU (Shazeer, 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x [B, C, H, W] with cross-attention to the context (Rombach et al., 2022).

    Args:
        channels: of x.
        heads, dim_head: attention heads, and the width of each.
        depth: blocks; with none the two projections are left, as in the host.
        context_dim: width of the context tokens.
        linear: projections as linear layers on tokens, not as convolutions; only the weights' shapes differ.
        groups: returns how many groups channels are normalised in.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int,
        linear: bool,
        groups: Callable[[int], int] = _layout,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.linear = linear
        self.norm = nn.GroupNorm(groups(channels), channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim) for _ in range(depth)
        )
        self.proj_out = _zeroed(nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        height = x.shape[2]
        h = self.norm(x)
        h = rearrange(h if self.linear else self.proj_in(h), "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height).contiguous()
        return (h if self.linear else self.proj_out(h)) + x


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        # To the size of the next skip, which is odd where the downsampling rounded up.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class UNet(nn.Module):
    """The LDM U-Net for small models; the arguments are those of the host's `UNetModel` that this project uses.

    Args:
        in_channels, out_channels: of x and of the prediction.
        model_channels: width of the shallowest level; a multiple of 32, the layout's group count.
        channel_mult: width of each level, in model_channels.
        num_res_blocks: residual blocks per level, one number each.
        transformer_depth: transformer blocks after each input residual block, shallow to deep (0: no transformer).
        transformer_depth_output: the same for the output blocks, in the host's order, popped from the end (deepest first).
        transformer_depth_middle: transformer blocks in the middle; as in the host, 0 leaves the transformer's projections, and
            -1 one residual block alone.
        num_heads, num_head_channels: attention heads, or the width of one; the width, where it is given, decides.
        context_dim: width of the context tokens; None where there is no transformer.
        use_scale_shift_norm: the timestep scales and shifts the features; otherwise it shifts them.
        use_linear_in_transformer: transformers project with linear layers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: list[int],
        num_res_blocks: list[int],
        transformer_depth: list[int],
        transformer_depth_output: list[int],
        transformer_depth_middle: int,
        num_heads: int = -1,
        num_head_channels: int = -1,
        context_dim: int | None = None,
        use_scale_shift_norm: bool = True,
        use_linear_in_transformer: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        emb_dim = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        def residual(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, emb_dim, out, use_scale_shift_norm)

        def transformer(channels: int, depth: int) -> SpatialTransformer:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            width = channels // num_heads if num_head_channels == -1 else num_head_channels
            return SpatialTransformer(channels, heads, width, depth, context_dim, use_linear_in_transformer)

        def transformers(channels: int, depth: int) -> list[nn.Module]:
            return [transformer(channels, depth)] if depth > 0 else []

        depths = list(transformer_depth)
        ch = model_channels
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks[level]):
                out = mult * model_channels
                self.input_blocks.append(TimestepEmbedSequential(residual(ch, out), *transformers(out, depths.pop(0))))
                ch = out
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch)))
                skips.append(ch)

        middle = [residual(ch, ch)]
        if transformer_depth_middle >= 0:
            middle += [transformer(ch, transformer_depth_middle), residual(ch, ch)]
        self.middle_block = TimestepEmbedSequential(*middle)

        depths = list(transformer_depth_output)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks[level] + 1):
                out = mult * model_channels
                layers = [residual(ch + skips.pop(), out), *transformers(out, depths.pop())]
                ch = out
                if level and i == num_res_blocks[level]:
                    layers.append(Upsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(nn.GroupNorm(GROUPS, ch), nn.SiLU(), _zeroed(nn.Conv2d(ch, out_channels, 3, padding=1)))

    def forward(self, x, timesteps, context=None, y=None, control=None, transformer_options=None):
        """Return the prediction [B, C, H, W] for x [B, C, H, W], timesteps [B] in 0..999, context [B, M, D]."""
        return self._forward(x, timesteps, context, y, control, transformer_options)

    def _forward(self, x, timesteps, context=None, y=None, control=None, transformer_options=None):
        options = {} if transformer_options is None else transformer_options
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            options["block"] = ("input", i)
            h = block(h, emb, context)
            skips.append(h)
        options["block"] = ("middle", 0)
        h = self.middle_block(h, emb, context)
        for i, block in enumerate(self.output_blocks):
            options["block"] = ("output", i)
            skip = skips.pop()
            for patch in options.get("patches", {}).get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            h = block(torch.cat([h, skip], dim=1), emb, context, skips[-1].shape[2:] if skips else None)
        return self.out(h)


def _zeroed(module: nn.Module) -> nn.Module:
    """Start a residual branch at zero, so that a new network is the identity (Dhariwal and Nichol, 2021)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
