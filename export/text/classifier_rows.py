"""Class embeddings from a teacher's own classifier: ImageNet's classes by name, for a student
without a CLIP teacher.

This is not zero-shot in CLIP's sense: the classes were learnt, the vocabulary is the classifier's,
and no text is encoded. A row of its weights is the prototype of a class in the space of the
teacher's image-level vector, which the student predicts. Cosines with the rows rank clearly worse
than the classifier itself (on the packaged photographs MobileNetV2's best of 1000 classes changes
in 4 of 19), so the rows' lengths and biases are stored too and the score is the classifier's logit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError, suggest
from export.text.tower import Label

if TYPE_CHECKING:  # --help must not wait for torch to load
    from torch import Tensor


def classifier_rows(
    run: Path, teacher: str, labels: Sequence[Label], source: Path
) -> tuple[dict[str, "Tensor"], dict]:
    """`embeddings` [C, d] (unit rows), `norms` [C] and `bias` [C] of the labels' classes, and
    metadata.

    Raises UserError for a run without that teacher, a teacher without a trained classifier of
    ImageNet or whose classifier does not read its image-level vector, and a label that matches no
    class or two.
    """
    import torch.nn.functional as F

    from distill.runs import load_run
    from distill.teachers import weights_source
    from distill.teachers.classifier import read_classifier

    configs = {
        config.label: (index, config) for index, config in enumerate(load_run(run).recipe.teachers)
    }
    if teacher not in configs:
        raise UserError(
            f"--classifier {teacher}: {run} has no such teacher: {suggest(teacher, configs)}"
        )
    index, config = configs[teacher]
    print(f"teacher   {teacher}: {config.name}, {weights_source(config)}")
    weight, bias = read_classifier(config, index, f"--classifier {teacher}")
    numbers = find_classes(labels, len(weight), source)
    rows = weight[numbers].float()
    tensors = {
        "embeddings": F.normalize(rows, dim=1),
        "norms": rows.norm(dim=1),
        "bias": bias[numbers].float(),
    }
    about = {
        "source": "classifier",
        "score": "linear",
        "teacher": teacher,
        "model": config.name,
        "pretrained": weights_source(config),
        "classes": [label.name for label in labels],
        "labels": [label.words for label in labels],
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def find_classes(labels: Sequence[Label], count: int, source: Path) -> list[int]:
    """Class number of every label in a classifier of `count` classes, by any of the class's names
    or its WordNet id.

    A class's first name wins over another class's synonym (`missile` and `projectile, missile`).
    Raises UserError for a label that names no class, or two equally.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        raise UserError(
            "--classifier needs an ImageNet head, such as one of 1,000 classes; this one has "
            f"{count}: choose another teacher"
        )
    info = ImageNetInfo(subset)
    first: dict[str, list[int]] = {}
    other: dict[str, list[int]] = {}
    for number, wnid in enumerate(info.label_names()):
        main, *synonyms = (
            name.strip().lower() for name in info.index_to_description(number).split(",")
        )
        first.setdefault(wnid, []).append(number)
        first.setdefault(main, []).append(number)
        for name in synonyms:
            other.setdefault(name, []).append(number)
    result = []
    for label in labels:
        words = label.words.lower()
        numbers = first.get(words) or other.get(words)
        where = f"{source}:{label.line}: '{label.words}'"
        if numbers is None:
            raise UserError(
                f"{where} is not a class of {subset}: "
                f"{suggest(words, first.keys() | other.keys())} (or give its WordNet id)"
            )
        if len(numbers) > 1:
            ids = " or ".join(info.index_to_label_name(number) for number in numbers)
            raise UserError(f"{where} names {len(numbers)} classes: write {label.name}<tab>{ids}")
        result += numbers
    return result
