"""A teacher's own frozen decoder as a task head, on what the student predicts of that teacher.

A decoder is code by reference, `python:package.module:function`, or a part of a transformers model
whose configuration is kept; its weights are in the head's file. `distill.attach` makes such heads.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError, first_line, out_of_memory
from distill.features import scaled
from distill.models.hugging_face import (
    attempt,
    import_transformers,
    model_class,
    refuse_kernels,
)
from distill.models.user_code import PYTHON, RAISED, call_for_module

TRANSFORMERS = "transformers:"
"""Before CLASS:PART of a decoder that is a part of a transformers model."""

Reads = Literal["patches", "token", "both"]

_SAMPLED = 16
"""Numbers that are kept of a decoder's answer to known features."""

_SAMPLE_ERROR = 1e-3
"""How far they may be off in another place, over the largest of them: machines round differently,
other code is off by far more.
"""


class TeacherDecoder(nn.Module):
    """A decoder between the student's grid and a task's output.

    The decoder is called with the patches [B, d, h, w], the image-level vector [B, g], or both in
    this order, all in the teacher's own units. Where the teacher's grid is `ratio` times as fine as
    the student's, patches are resampled to it first. `scale` is how many rows of the answer there
    are for a row of the student's patches; an answer that other sizes would round to other numbers
    is resized to them (`resize`). `fixed` says that the decoder runs on the grid of `side` rows
    alone. `single`: the answer has one value a position, and no axis for it.
    """

    def __init__(
        self,
        decoder: str,
        kwargs: Mapping[str, Any],
        reads: Reads,
        width: int,
        token: int | None,
        side: int,
        classes: int = 1,
        single: bool = False,
        ratio: str = "1",
        scale: str = "1",
        resize: bool = False,
        fixed: bool = False,
        built: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings = {
            "decoder": decoder,
            "kwargs": dict(kwargs),
            "reads": reads,
            "width": width,
            "token": token,
            "side": side,
            "classes": classes,
            "single": single,
            "ratio": ratio,
            "scale": scale,
            "resize": resize,
            "fixed": fixed,
        }
        self.reads, self.single, self.resize, self.fixed = reads, single, resize, fixed
        self.width, self.token, self.side = width, token, side
        self.ratio, self.scale = Fraction(ratio), Fraction(scale)
        self.decoder = built if built is not None else build_decoder(decoder, kwargs)
        self.eval().requires_grad_(False)

    def forward(self, patches: Tensor, token: Tensor | None = None) -> Tensor:
        """The task's output of the student's prediction, patches [B, h, w, d] and vector [B, g]:
        [B, C, h', w'], [B, h', w'] or [B, C].
        """
        if self.reads == "token":
            return self.decode(patches, token)
        grid = patches.shape[1:3]
        if self.ratio != 1:
            size = [scaled(side, self.ratio) for side in grid]
            rows = F.interpolate(
                patches.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False
            )
            patches = rows.permute(0, 2, 3, 1)
        answer = self.decode(patches, token)
        if not self.resize:
            return answer
        size = [scaled(side, self.scale) for side in grid]
        whole = answer.unsqueeze(1) if self.single else answer
        whole = F.interpolate(whole, size=size, mode="bilinear", align_corners=False)
        return whole.squeeze(1) if self.single else whole

    def decode(self, patches: Tensor, token: Tensor | None = None) -> Tensor:
        """The same of features on the teacher's grid, such as its own."""
        inputs = {"patches": patches.permute(0, 3, 1, 2), "token": token}
        names = ("patches", "token") if self.reads == "both" else (self.reads,)
        answer = self.decoder(*(inputs[name] for name in names))
        return answer.squeeze(1) if self.single and answer.ndim == 4 else answer


def build_decoder(reference: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A decoder before its weights are loaded; a `python:` one runs the user's code.

    Raises UserError for one that cannot be built.
    """
    if reference.startswith(PYTHON):
        return call_for_module(reference, kwargs)
    _, name, part = reference.split(":")
    transformers = import_transformers(reference)

    def build() -> nn.Module:
        settings = dict(kwargs["config"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        refuse_kernels(config, reference, "attach it again")
        return model_class(transformers, name, reference)(config).get_submodule(part).float()

    remedy = f"attach it again with transformers {transformers.__version__}, which is installed"
    return attempt(reference, build, remedy, remedy)


@torch.no_grad()
def try_decoder(module: TeacherDecoder, patches: Tensor, token: Tensor | None, own: bool) -> Tensor:
    """The answer of a decoder to the student's prediction or, with `own`, to the teacher's
    features; raises UserError, with what it was given, where its code fails.
    """
    call = module.decode if own else module
    try:
        return call(patches, token)
    except RAISED as error:
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        given = [f"patches {[*patches.shape[:1], patches.shape[3], *patches.shape[1:3]]}"]
        if token is not None:
            given.append(f"token {list(token.shape)}")
        chosen = given if module.reads == "both" else given[int(module.reads == "token") :][:1]
        width = module.token if module.reads == "token" else module.width
        raise UserError(
            f"{module.settings['decoder']} failed on {' and '.join(chosen)} (the teacher's width "
            f"is {width}): {type(error).__name__} ({first_line(error)})"
        ) from error


def sample_decoder(module: TeacherDecoder) -> list[float]:
    """A few numbers of a decoder's answer to known features, by which other code shows."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, module.side, module.side, module.width, generator=generator)
    token = None
    if module.token is not None:
        token = torch.randn(1, module.token, generator=generator)
    values = try_decoder(module, patches, token, own=False).float().flatten()
    places = torch.linspace(0, len(values) - 1, _SAMPLED).round().long()
    return values[places].tolist()


def check_sample(module: TeacherDecoder, expected: list[float], source: str) -> None:
    """Raise UserError where a rebuilt decoder does not answer as it did when it was attached."""
    got, wanted = torch.tensor(sample_decoder(module)), torch.tensor(expected)
    if not torch.allclose(got, wanted, rtol=0, atol=_SAMPLE_ERROR * float(wanted.abs().max())):
        raise UserError(
            f"{source}: {module.settings['decoder']} gives other numbers than when it was "
            "attached: its code or its library has changed; attach it again"
        )
