"""fp16 and bf16: the student is cast before tracing. (int8: Q/DQ nodes after calibration,
int8.py.)
"""

import copy
from dataclasses import replace

import torch

from distill.methods.targets import FeatureNormalizer
from distill.models.preprocess import Preprocess
from export.graph import DPT, UPERNET, Student

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast_student(student: Student, precision: str) -> Student:
    """A copy whose network, interaction and heads compute in `precision`.

    Inputs and outputs stay float32, as do the picture's normalization, the conversion back to the
    teachers' units and the task heads; these are all tiny except DPT's and UPerNet's, which are
    cast too.
    """
    if precision not in ("fp16", "bf16"):
        return student
    exact = student.deployment.folded()  # products of weights are rounded once
    deployment = copy.deepcopy(exact).to(DTYPES[precision])
    for before, after in zip(exact.modules(), deployment.modules(), strict=True):
        if isinstance(before, Preprocess | FeatureNormalizer):
            after.float()
            for whole, rounded in zip(_constants(before), _constants(after), strict=True):
                rounded.copy_(whole)  # undo the rounding of the cast
    heads = tuple(
        replace(head, module=copy.deepcopy(head.module).to(DTYPES[precision]))
        if head.kind in (DPT, UPERNET)
        else head
        for head in student.heads
    )
    return replace(student, deployment=deployment, heads=heads)


def _constants(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
