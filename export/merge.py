"""Branches that exist for training alone, merged before a student is traced.

MobileOne, FastViT, RepViT, RepVGG and others train several parallel convolutions, each with its
batch normalisation, whose sum is one convolution. ONNX keeps what is traced: unmerged they take a
multiple of the time.
"""

import copy
import logging
from dataclasses import replace

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from contract.errors import first_line
from export.graph import Student

log = logging.getLogger(__name__)

_MERGES = ("fuse", "reparameterize", "switch_to_deploy")
"""timm's methods of a layer that can be merged."""

_EXACT = 1e-3
"""Largest error of the merged features, over their length: that of the parity gate for fp32."""


def merge_branches(student: Student, size: tuple[int, int]) -> Student:
    """A copy whose network has its parallel branches and batch normalisations merged, and says of
    how many layers in `merged`; the student itself where its network has none.

    Where timm cannot merge a network, or another function comes of it on a picture of `size` =
    (height, width) pixels, a log line says so and the student stays as it is.
    """
    network = student.deployment.student.net
    layers = sum(any(hasattr(part, name) for name in _MERGES) for part in network.modules())
    if not layers:
        return student
    deployment = copy.deepcopy(student.deployment)
    try:
        deployment.student.net = reparameterize_model(deployment.student.net)
        error = _difference(student.deployment, deployment, size)
    # what a layer's own method makes of a network without its classifier, say
    except Exception as cause:
        log.info("merging   not done: %s (%s)", type(network).__name__, first_line(cause))
        return student
    if not error <= _EXACT:
        log.info("merging   not done: merged features are off by %.1e of their length", error)
        return student
    log.info("merging   %d layers, off by %.1e", layers, error)
    return replace(student, deployment=deployment, merged=layers)


@torch.inference_mode()
def _difference(whole: nn.Module, merged: nn.Module, size: tuple[int, int]) -> float:
    """Length of the difference of two deployments' features over their length, on noise."""
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))

    def features(deployment: nn.Module) -> Tensor:
        encoded = deployment.student(deployment.preprocess.normalize(pixels))
        return torch.cat([part.flatten() for part in encoded.named().values()])

    exact = features(whole)
    return float((features(merged) - exact).norm() / exact.norm())
