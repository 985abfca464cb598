"""Sizes of the parts of SeFA and UNIC at full size, counted on the meta device."""

import pytest
import torch

from distill.features import FeatureDims
from distill.methods.projectors import FeatureHead, LadderHead, mlp
from distill.methods.self_supervised.dino import Head
from distill.models.student import Student
from distill.recipe_io import load_recipe

# Width; student, DINO's head (its rows' lengths aside), a head of one kind, UNIC's ladder of both
# kinds, for a teacher of the same width: millions of parameters
SIZES = [
    ("tiny", 192, 5.5, 21.9, 4.99, 8.9),
    ("small", 384, 21.7, 22.3, 5.77, 17.7),
    ("base", 768, 85.8, 23.1, 7.34, 35.4),
]


def millions(module: torch.nn.Module, digits: int = 1) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, digits)


@pytest.mark.parametrize(("name", "width", "network", "scores", "head", "ladder"), SIZES)
def test_the_parts_of_a_recipe_are_as_large_as_expected(name, width, network, scores, head, ladder):
    sefa, unic = (load_recipe(f"{method}_vit_{name}", []) for method in ("sefa", "unic"))
    dims, ssl, hidden = FeatureDims(width, width), sefa.ssl, sefa.sefa.hidden
    with torch.device("meta"):
        student = Student(sefa.student)
        prototypes = Head(
            width, ssl.prototypes, ssl.head_hidden, ssl.bottleneck, ssl.norm_last_layer
        )
        heads = FeatureHead(lambda out: mlp((width, hidden, hidden, out)), dims)
        blocks = [width] * len(student.net.blocks)
        projectors = LadderHead(blocks, unic.unic.hidden, unic.unic.last_hidden, dims)
    assert (student.width, millions(student)) == (width, network)
    assert millions(projectors) == ladder
    assert millions(heads.token, 2) == millions(heads.patches, 2) == head
    assert prototypes.prototypes.length.requires_grad == (name != "base")
    del prototypes.prototypes.length
    assert millions(prototypes) == scores
