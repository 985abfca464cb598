"""Which cross-space and intra-space modules UMT's `Config` asks for."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from contract.errors import UserError
from distill.methods.interaction import (
    AttentionInteraction,
    ConvInteraction,
    CrossSpace,
    GroupedAttentionInteraction,
    IntraSpace,
    default_heads,
    gcd_groups,
)

if TYPE_CHECKING:
    from distill.methods.umt import Config


def build_cross(config: "Config", cnn: bool, spaces: int, width: int) -> nn.Module:
    """One psi_C for `spaces` spaces of `width` channels."""
    mode = config.cross_mode
    if mode is None:
        return SkipInteraction()
    if mode == "channel" and cnn:
        return CrossSpace(conv_block(config, spaces * width, width), "channel")
    heads = resolve_heads(config, width)
    if mode == "channel":  # A.2: heads grow linearly with the number of teachers
        return CrossSpace(
            AttentionInteraction(spaces * width, spaces * heads, config.cross_mlp_ratio), "channel"
        )
    if mode == "grouped":
        block = GroupedAttentionInteraction(
            spaces * width, spaces, spaces * heads, config.cross_mlp_ratio
        )
        return CrossSpace(block, "channel")
    return CrossSpace(AttentionInteraction(width, heads, config.cross_mlp_ratio), mode)


def build_intra(config: "Config", cnn: bool, width: int) -> nn.Module:
    """One phi_I of `width` channels."""
    if not config.intra_space:
        return SkipInteraction()
    if cnn:
        return IntraSpace(conv_block(config, width, width))
    return IntraSpace(
        AttentionInteraction(width, resolve_heads(config, width), config.intra_mlp_ratio)
    )


class SkipInteraction(nn.Module):
    """The identity that stands for an ablated module (Table 3)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return [B, N, M, c] unchanged."""
        return x


def conv_block(config: "Config", channels: int, width: int) -> ConvInteraction:
    """A CNN module; raises UserError naming the nearest legal d_m where the groups do not divide
    the channels.
    """
    groups = gcd_groups(width) if config.groups == "auto" else config.groups
    if width % groups:
        raise UserError(
            f"umt.groups = {groups} does not divide space_dim + token_dim = {width}: "
            f"{nearest_token_dims(config, width, groups)}, or set umt.groups=auto"
        )
    return ConvInteraction(channels, groups, config.interleave)


def resolve_heads(config: "Config", width: int) -> int:
    """Heads of an intra-space block; raises UserError naming the nearest legal d_m where they do
    not divide.
    """
    if config.heads == "auto":
        return default_heads(width)
    if width % config.heads:
        raise UserError(
            f"umt.heads = {config.heads} does not divide space_dim + token_dim = {width}: "
            f"{nearest_token_dims(config, width, config.heads)}, or set umt.heads=auto"
        )
    return config.heads


def nearest_token_dims(config: "Config", width: int, divisor: int) -> str:
    """Name the values of token_dim next to the present one that `divisor` can work with."""
    below = width // divisor * divisor
    if not config.model_token:
        return f"use umt.space_dim={below or divisor} or {below + divisor}"
    token_dim = config.token_dim if isinstance(config.token_dim, int) else 64
    legal = [token_dim + total - width for total in (below, below + divisor)]
    return "use umt.token_dim=" + " or ".join(str(value) for value in legal if value > 0)
