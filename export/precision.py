"""Precision lives in the graph: a cast before tracing (fp16, bf16), or Q/DQ nodes after calibration
(`int8.py`).
"""

import copy
from dataclasses import replace

import torch

from distill.methods.targets import FeatureNormalizer
from distill.models.preprocess import Preprocess
from export.graph import DPT, Student

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast_student(student: Student, precision: str) -> Student:
    """A copy whose network, interaction and heads compute in `precision`.

    What goes in and comes out stays float32, as do the picture's normalisation, the way back to the
    teachers' units and the task heads, all of them tiny but DPT's, which is cast too.
    """
    if precision not in ("fp16", "bf16"):
        return student
    deployment = copy.deepcopy(student.deployment).to(DTYPES[precision])
    for before, after in zip(student.deployment.modules(), deployment.modules(), strict=True):
        if isinstance(before, Preprocess | FeatureNormalizer):
            after.float()
            for exact, rounded in zip(constants(before), constants(after), strict=True):
                rounded.copy_(exact)  # the cast has rounded it
    heads = tuple(
        replace(head, module=copy.deepcopy(head.module).to(DTYPES[precision]))
        if head.kind == DPT
        else head
        for head in student.heads
    )
    return replace(student, deployment=deployment, heads=heads)


def constants(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
