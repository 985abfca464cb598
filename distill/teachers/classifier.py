"""The classifier that a teacher brings along, where it reads the vector that the student learns."""

import torch
from torch import Tensor

from contract.errors import UserError
from distill.config import TeacherConfig, TeacherRuntime
from distill.fields import source_of
from distill.teachers import build_teacher


def read_classifier(config: TeacherConfig, index: int, option: str) -> tuple[Tensor, Tensor]:
    """Weights [K, d] and biases [K] of the classifier of teacher number `index` of a recipe.

    Raises UserError, beginning with the `option` that names the teacher, unless it is a trained
    linear layer on the teacher's summary. Only networks of timm's are built: no code that a run
    names is ever imported for it.
    """
    wrong = f"{option}: {config.name}"
    if source_of(config.name)[0] in ("hf", "python"):
        raise UserError(f"{wrong} is no network of timm's: choose another teacher")
    teacher = build_teacher(config, TeacherRuntime(precision="fp32"), index)
    net = teacher.net
    classifier = net.get_classifier() if hasattr(net, "get_classifier") else None
    if not isinstance(classifier, torch.nn.Linear):
        raise UserError(f"{wrong} has no linear classifier (choose another teacher)")
    random = not config.pretrained and config.checkpoint is None
    if random or not getattr(net, "classifier_loaded", True):
        raise UserError(
            f"{wrong} has no trained classifier: its weights do not include one (choose another "
            "teacher)"
        )
    with torch.inference_mode():
        pixels = torch.rand(
            2, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(0)
        )
        summary, logits = teacher.encode(pixels).summary, net(pixels)
        reads = summary is not None and summary.shape[1] == classifier.in_features
        if not (reads and torch.allclose(classifier(summary), logits, rtol=1e-3, atol=1e-3)):
            raise UserError(
                f"{wrong}'s classifier reads something else than the vector that the student "
                "learns (another block, other pooling, or an embedding after it): choose another "
                "teacher"
            )
    weight = classifier.weight.detach()
    if classifier.bias is None:
        return weight, weight.new_zeros(len(weight))
    return weight, classifier.bias.detach()
