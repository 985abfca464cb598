"""iBOT: DINO, and the hidden patches of a global crop predicted from what the momentum network says
of them (Zhou et al. 2022).

Blocks of patches of the student's global crops are replaced by a learnt vector; the class token is
never hidden, and the momentum network sees everything. L = L_cls + L_patch, where L_patch is, for
each global crop, the mean over its hidden patches of the cross-entropy between the two networks'
scores of the same patch in the same crop; a crop without hidden patches counts as 0.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.config import Recipe
from distill.data.crops import View
from distill.data.masks import BlockMask
from distill.distributed import mean_over_ranks
from distill.methods.self_supervised.dino import (
    DINO,
    GLOBAL,
    Encoded,
    Head,
    Prototypes,
    cross_entropy,
    move_center,
    spread,
)
from distill.models.student import Student


class TwoLayerHead(Head):
    """A head with a second last layer, for patches, on the same MLP."""

    def __init__(self, patch_prototypes: int, width: int, *rest: object) -> None:
        super().__init__(width, *rest)
        *_, bottleneck, unit = rest
        self.patch_prototypes = Prototypes(bottleneck, patch_prototypes, unit)


def patch_loss(student: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean over crops of the mean cross-entropy over their hidden patches.

    `student` [N, L, K]: logits over tau_s; `targets` [N, L, K]: the momentum teacher's
    distributions; `mask` [N, L].
    """
    losses = cross_entropy(targets, student) * mask
    return (losses.sum(1) / mask.sum(1).clamp_min(1)).mean()


class IBOT(DINO):
    """DINO's parts, the vector in place of hidden patches, and a centre of patches."""

    kind = "ibot"
    needs_blocks = True
    losses = ("ssl.loss", "ssl.cls", "ssl.patches", "ssl.hidden")

    def __init__(self, recipe: Recipe, student: Student) -> None:
        super().__init__(recipe, student)
        ibot = self.config.ibot
        number = self.config.prototypes if ibot.shared_head else ibot.patch_prototypes
        self.filler = nn.Parameter(torch.zeros(student.width))
        self.register_buffer("patch_center", torch.zeros(number))

    @classmethod
    def views(cls, recipe: Recipe, student: Student) -> tuple[View, ...]:
        """DINO's, with a mask for every global crop."""
        ibot, grid = recipe.ssl.ibot, recipe.student.image_size // student.stride
        mask = BlockMask(grid, ibot.mask_ratio, ibot.ratio_spread, ibot.aspect)
        crops, *others = super().views(recipe, student)
        return (crops._replace(mask=mask), *others)

    def encode(
        self, student: Student, images: Mapping[str, Tensor], views: Mapping[str, Tensor]
    ) -> Encoded:
        """As DINO's; distillation gets the features of the global crops with hidden patches."""
        mask = views[f"{GLOBAL}.mask"]
        tokens = student.tokens(images[GLOBAL], mask, self.filler)
        features = student.read(student.net.norm(tokens), images[GLOBAL])
        summaries = torch.cat([features.summary, *self._local_summaries(student, images)])
        places, hidden = self._hidden(mask)
        with torch.no_grad():
            seen = self.momentum(images[GLOBAL])
            followed = self.momentum_head(seen.summary).float()
            embedded = self.momentum_head.embed(seen.patches.flatten(1, 2))
            last = self._last_layer(self.momentum_head)
            followed_patches = last(_take(embedded, places)).float()
            # scores are linear in the embedding: their mean over all positions needs one row
            mean = last(embedded.mean((0, 1))).float()
        loss, values = self.compare(self.head(summaries).float(), followed)
        embedded = self.head.embed(_take(features.patches.flatten(1, 2), places))
        patches = self.compare_patches(
            self._last_layer(self.head)(embedded).float(), followed_patches, hidden, mean
        )
        total = loss + patches
        values |= {"ssl.loss": total.detach(), "ssl.cls": loss.detach()}
        values |= {"ssl.patches": patches.detach(), "ssl.hidden": mask.float().mean()}
        return Encoded(features, total, values | spread(features), mask)

    def compare_patches(
        self, student: Tensor, teacher: Tensor, hidden: Tensor, mean: Tensor
    ) -> Tensor:
        """L_patch of student and momentum scores [N, P, K], of which those `hidden` bool [N, P]
        count; moves the centre of patches by the momentum scores' `mean` [K] over all positions,
        hidden or not.
        """
        targets = ((teacher - self.patch_center) / self.temperature).softmax(-1)
        loss = patch_loss(student / self.config.student_temp, targets, hidden)
        if self.training:
            move_center(self.patch_center, mean_over_ranks(mean), self.config.center_momentum)
        return loss

    def _hidden(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [N, P] among which are all that `mask` [N, h, w] hides, and which of them it
        does: of fixed number, the most that a crop may hide, so that nothing waits for the device.
        """
        flat = mask.flatten(1)
        pairs = zip(self.config.ibot.mask_ratio, self.config.ibot.ratio_spread, strict=True)
        most = max(ratio + spread for ratio, spread in pairs)
        number = max(1, min(flat.shape[1], math.ceil(most * flat.shape[1])))
        hidden, places = flat.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        return places[:, :number], hidden[:, :number].bool()

    def _last_layer(self, head: Head) -> Prototypes:
        return head.prototypes if self.config.ibot.shared_head else head.patch_prototypes

    def _build_head(self, width: int) -> Head:
        ssl = self.config
        rest = (ssl.prototypes, ssl.head_hidden, ssl.bottleneck, ssl.norm_last_layer)
        if ssl.ibot.shared_head:
            return Head(width, *rest)
        return TwoLayerHead(ssl.ibot.patch_prototypes, width, *rest)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """Rows [N, P, d] of [N, L, d] at `places` [N, P]."""
    return rows.gather(1, places.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
