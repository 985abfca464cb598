"""KPU's student: a frozen ViT, the sentinel, inside a trainable ViT-Adapter (Chen et al. 2023).

A convolutional spatial prior makes maps of 1/4, 1/8, 1/16 and 1/32 of the picture's side. Before
each of K groups of the ViT's blocks an injector adds what the patch tokens read from the maps, and
after it an extractor adds what the maps read from the patch tokens. The injectors' gates start at
zero: an untrained student says of a picture what its sentinel says, bit for bit.

Follows the public ViT-Adapter for DINOv2, except for GroupNorm in place of SyncBatchNorm (streams
of other sizes would share its statistics) and maps of any size: strided convolutions round up, so
every multiple of the ViT's patch will do.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contract.errors import UserError
from distill.config import Fraction, NonNegative, Positive, Section, StudentConfig
from distill.features import Features
from distill.models.deformable import DeformableAttention, Grid, PlainAttention, split_maps
from distill.models.student import Layer, Student, dpt_blocks

_STRIDES = (4, 8, 16, 32)
_GROUPS = 32
"""Groups of a GroupNorm."""
_EPS = 1e-6


class AdapterConfig(Section):
    """The ViT-Adapter around the sentinel; the defaults are those of the public ViT-Adapter-B."""

    blocks: Positive = Field(
        4, description="K interactions, each around as many of the ViT's blocks"
    )
    extra: NonNegative = Field(2, description="extractors after the last interaction")
    width: Positive = Field(64, description="channels of the first convolutions")
    heads: Positive = Field(12, description="heads of its attention")
    points: Positive = Field(4, description="places a head looks at on each map")
    value_ratio: Annotated[float, Field(gt=0)] = Field(
        0.5, description="width of attention's values over the ViT's width"
    )
    ffn_ratio: Annotated[float, Field(gt=0)] = Field(
        0.25, description="width of the extractors' MLP over the ViT's width"
    )
    norm: Literal["group", "batch"] = Field(
        "group", description="of convolutions and maps; batch: over a process's own pictures"
    )
    attention: Literal["deformable", "plain"] = Field(
        "deformable", description="plain: every token attends to all, for small pictures"
    )
    drop_path: Fraction = Field(0.0, description="stochastic depth of the extractors' MLPs")
    grad_checkpointing: bool = Field(
        False, description="compute interactions again in the backward pass, to save memory"
    )


class ViTAdapter(Student):
    """A frozen timm ViT with a class token and a trainable adapter, as one student.

    `Features.summary` and `patches` are the ViT's after its final norm, `maps` the adapter's, of
    the ViT's width. Raises UserError for a network that is no plain ViT, and for an adapter that
    does not fit it.
    """

    map_strides = _STRIDES

    def __init__(self, config: StudentConfig, adapter: AdapterConfig) -> None:
        super().__init__(config)
        self._check(config, adapter)
        self.net.requires_grad_(False)
        self.net.eval()
        width, self.recompute = self.width, adapter.grad_checkpointing
        self.map_widths = (width,) * len(_STRIDES)
        norm = partial(nn.GroupNorm, _GROUPS) if adapter.norm == "group" else nn.BatchNorm2d
        self.prior = _SpatialPrior(adapter.width, width, norm)
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        self.interactions = nn.ModuleList(
            _Interaction(width, adapter) for _ in range(adapter.blocks)
        )
        self.extra = nn.ModuleList(_Extractor(width, adapter) for _ in range(adapter.extra))
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norms = nn.ModuleList(norm(width) for _ in _STRIDES)
        self._initialize()

    def train(self, mode: bool = True) -> "ViTAdapter":
        """Set the adapter's mode; the sentinel stays in eval mode."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, images: Tensor) -> Features:
        """Encode normalised images [B, 3, H, W] whose sides are multiples of the patch P.

        Returns the summary [B, d], patches [B, H/P, W/P, d] and four maps [B, h_l, w_l, d], finest
        first; h_l is H over the stride, halved step by step and rounded up.
        """
        return self._encode(images)[0]

    def layers(self, images: Tensor) -> tuple[Features, list[Layer]]:
        """The features and four layers of the ViT (see `dpt_layers`), with what was injected."""
        features, kept = self._encode(images, dpt_blocks(len(self.net.blocks)))
        return features, [self._layer(self.net.norm(tokens), images) for tokens in kept]

    def every_layer(self, images: Tensor) -> list[Layer]:
        """Every block of the ViT without the final norm, with what was injected."""
        _, kept = self._encode(images, range(len(self.net.blocks)))
        return [self._layer(tokens, images) for tokens in kept]

    def no_weight_decay(self) -> set[str]:
        """The levels' embeddings; the sentinel is not trained."""
        return {"level_embed"}

    def _layer(self, tokens: Tensor, images: Tensor) -> Layer:
        features = self.read(tokens, images)
        return Layer(features.summary, features.patches)

    def _encode(
        self, images: Tensor, keep: Collection[int] = ()
    ) -> tuple[Features, Sequence[Tensor]]:
        """The features, and the tokens [B, prefix + h * w, d] after the blocks in `keep`."""
        net = self.net
        tokens = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        fine, *levels = self.prior(images)
        grids = [tuple(level.shape[2:]) for level in levels]
        spatial = torch.cat(
            [
                level.flatten(2).transpose(1, 2) + embed
                for level, embed in zip(levels, self.level_embed, strict=True)
            ],
            dim=1,
        )
        kept: list[Tensor] = []
        share = len(net.blocks) // len(self.interactions)
        for number, interaction in enumerate(self.interactions):
            first = number * share
            step = partial(
                self._interact, interaction, range(first, first + share), keep, grid, grids
            )
            if self.recompute and torch.is_grad_enabled():
                tokens, spatial, found = checkpoint(step, tokens, spatial, use_reentrant=False)
            else:
                tokens, spatial, found = step(tokens, spatial)
            kept += found
        patches = tokens[:, self.prefix :]
        for extractor in self.extra:
            spatial = extractor(spatial, patches, grids, grid)
        maps = self._pyramid(fine, spatial, grids, patches, grid)
        features = self.read(net.norm(tokens), images)
        return features._replace(maps=maps), kept

    def _interact(
        self,
        interaction: "_Interaction",
        blocks: range,
        keep: Collection[int],
        grid: Grid,
        grids: Sequence[Grid],
        tokens: Tensor,
        spatial: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Inject into the patch tokens, run some of the ViT's blocks, extract from what they
        say.
        """
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = interaction.injector(patches, spatial, grid, grids)
        tokens, kept = torch.cat((prefix, patches), dim=1), []
        for index in blocks:
            tokens = self.net.blocks[index](tokens)
            if index in keep:
                kept.append(tokens)
        spatial = interaction.extractor(spatial, tokens[:, self.prefix :], grids, grid)
        return tokens, spatial, kept

    def _pyramid(
        self, fine: Tensor, spatial: Tensor, grids: Sequence[Grid], patches: Tensor, grid: Grid
    ) -> tuple[Tensor, ...]:
        """The four maps, each with the last block's patch tokens added at its own size."""
        parts = split_maps(spatial, grids, dim=1)
        levels = [
            part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, grids, strict=True)
        ]
        rows, columns = fine.shape[2:]
        # twice a side that was rounded up may be one more than the finer map has
        levels.insert(0, self.up(levels[0])[:, :, :rows, :columns] + fine)
        tokens = patches.transpose(1, 2).unflatten(2, grid)
        maps = []
        for level, norm in zip(levels, self.norms, strict=True):
            size = tuple(level.shape[2:])
            # without antialiasing, as in the public adapter: TensorRT has no such Resize
            seen = F.interpolate(tokens, size=size, mode="bilinear", align_corners=False)
            maps.append(norm(level + seen).permute(0, 2, 3, 1))
        return tuple(maps)

    def _check(self, config: StudentConfig, adapter: AdapterConfig) -> None:
        name, width = config.name, self.width
        if not isinstance(self.net, VisionTransformer) or not self.has_class_token:
            raise UserError(
                f"student.name = {name}: an adapter needs a plain ViT with a class token: choose "
                "another one, such as vit_base_patch14_dinov2"
            )
        depth = len(self.net.blocks)
        if depth % adapter.blocks:
            divisors = [str(n) for n in range(1, depth + 1) if depth % n == 0]
            raise UserError(
                f"kpu.adapter.blocks = {adapter.blocks} does not divide the {depth} blocks of "
                f"'{name}': use {', '.join(divisors)}"
            )
        inner = width * adapter.value_ratio
        if inner % adapter.heads or width % adapter.heads:
            raise UserError(
                f"kpu.adapter.heads = {adapter.heads} does not divide the width {width} of "
                f"'{name}' and, times kpu.adapter.value_ratio, {inner:g}: use another number"
            )
        sides = {"kpu.adapter.width": adapter.width, f"the width of '{name}'": width}
        for key, value in sides.items():
            if adapter.norm == "group" and value % _GROUPS:
                raise UserError(
                    f"{key} = {value} is no multiple of the {_GROUPS} groups of its norms: set "
                    "kpu.adapter.norm=batch or another width"
                )

    def _initialize(self) -> None:
        nn.init.normal_(self.level_embed)
        for part in (self.prior, self.interactions, self.extra, self.up):
            part.apply(_initialize)
        for module in self.modules():
            if isinstance(module, DeformableAttention | PlainAttention):
                module.initialize()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # He's for the outgoing signal, over groups
        fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _SpatialPrior(nn.Module):
    """Convolutions from a picture to maps of a position every 4, 8, 16 and 32 pixels."""

    def __init__(self, width: int, out: int, norm: type[nn.Module] | partial) -> None:
        super().__init__()

        def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            return [layer, norm(after), nn.ReLU()]

        self.stem = nn.Sequential(
            *convolution(3, width, 2),
            *convolution(width, width, 1),
            *convolution(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        sides = ((width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width))
        self.stages = nn.ModuleList(nn.Sequential(*convolution(*side, 2)) for side in sides)
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.to_width = nn.ModuleList(nn.Conv2d(width, out, 1) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [B, d, h_l, w_l], finest first, of normalised images [B, 3, H, W]."""
        levels = [self.stem(images)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return [layer(level) for layer, level in zip(self.to_width, levels, strict=True)]


def _attention(width: int, levels: int, adapter: AdapterConfig) -> nn.Module:
    if adapter.attention == "plain":
        return PlainAttention(width, adapter.heads, adapter.value_ratio)
    return DeformableAttention(width, levels, adapter.heads, adapter.points, adapter.value_ratio)


class _Injector(nn.Module):
    """Adds what patch tokens read from the three coarser maps, behind a gate that starts shut."""

    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__()
        self.norm, self.source_norm = (nn.LayerNorm(width, eps=_EPS) for _ in range(2))
        self.attention = _attention(width, 3, adapter)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(
        self, patches: Tensor, spatial: Tensor, grid: Grid, grids: Sequence[Grid]
    ) -> Tensor:
        """Patch tokens [B, h * w, d] after reading maps' tokens [B, S, d] of sizes `grids`."""
        read = self.attention(self.norm(patches), self.source_norm(spatial), [grid], grids)
        return patches + self.gate * read


class _Extractor(nn.Module):
    """Adds what the maps' tokens read from patch tokens, and an MLP with a convolution."""

    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__()
        self.norm, self.source_norm, self.mlp_norm = (
            nn.LayerNorm(width, eps=_EPS) for _ in range(3)
        )
        self.attention = _attention(width, 1, adapter)
        self.mlp = _ConvMLP(width, round(width * adapter.ffn_ratio))
        self.drop_path = DropPath(adapter.drop_path)

    def forward(
        self, spatial: Tensor, patches: Tensor, grids: Sequence[Grid], grid: Grid
    ) -> Tensor:
        """Maps' tokens [B, S, d] of sizes `grids` after reading patch tokens [B, h * w, d]."""
        read = self.attention(self.norm(spatial), self.source_norm(patches), grids, [grid])
        spatial = spatial + read
        return spatial + self.drop_path(self.mlp(self.mlp_norm(spatial), grids))


class _ConvMLP(nn.Module):
    """Linear, a depth-wise 3 x 3 convolution on each map, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens [B, S, d] of maps of the sizes `grids`, one after another."""
        parts = split_maps(self.up(tokens), grids, dim=1)
        maps = [
            self.convolution(part.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            for part, grid in zip(parts, grids, strict=True)
        ]
        return self.down(F.gelu(torch.cat(maps, dim=1)))


class _Interaction(nn.Module):
    """What stands before and after a group of the ViT's blocks."""

    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__()
        self.injector = _Injector(width, adapter)
        self.extractor = _Extractor(width, adapter)
