"""Zero-shot classification: the class whose embedding is nearest in cosine (CLIP's protocol, KPU
Table 1).

A file of `export.text --classifier` holds rows of a teacher's classifier instead: then the score is
that classifier's logit.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contract.errors import UserError, raise_trouble
from distill.evaluate.archives import open_labelled
from distill.evaluate.classification import accuracy
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import PolicyViews, extract
from distill.evaluate.outcome import Outcome


class Classes(NamedTuple):
    """Embeddings [C, d]; of a classifier's rows also their lengths [C] and biases [C]."""

    embeddings: Tensor
    norms: Tensor | None = None
    bias: Tensor | None = None


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig, cache: Path) -> Outcome:
    """Top-1 and top-5 of the validation split; the embeddings are in the space of the features
    (`--features clip`).
    """
    if not config.zero_shot.embeddings:
        raise UserError(
            "zero-shot needs class embeddings: set zero_shot.embeddings=FILE.safetensors (tensor "
            "`embeddings` [C, d], metadata `classes`: a JSON list of the class folders' names)"
        )
    encoder.need_summary("zero-shot")
    val = open_labelled(data, "val")
    classes = read_classes(Path(config.zero_shot.embeddings), val.classes)
    width, expected = classes.embeddings.shape[1], encoder.dims.summary
    if width != expected:
        raise UserError(
            f"{config.zero_shot.embeddings} has {width}-d embeddings, but {encoder.name}'s "
            f"'{encoder.read_out}' features are {expected}-d: choose the head of the teacher they "
            "come from (for example --features clip)"
        )
    views = PolicyViews(val, encoder.image_size, encoder.view_of(config.extract))
    features = extract(encoder, views, cache, config.extract, what="val split").summaries()
    scores, report = accuracy(
        class_scores(features, classes), torch.from_numpy(val.labels), val.classes
    )
    return Outcome(scores, {"per_class": report})


def class_scores(features: Tensor, classes: Classes) -> Tensor:
    """Scores [n, C] of features [n, d]: cosines, or logits of a classifier's rows."""
    directions = F.normalize(classes.embeddings.float(), dim=1)
    if classes.norms is None or classes.bias is None:
        return F.normalize(features.float(), dim=1) @ directions.T
    return features.float() @ directions.T * classes.norms + classes.bias


def read_classes(path: Path, classes: tuple[str, ...]) -> Classes:
    """Embeddings in the order of `classes`; raises UserError for a damaged file or missing
    classes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"zero_shot.embeddings = {path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise_trouble(path, error)
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): create it again"
        ) from error
    embeddings = tensors.get("embeddings")
    if embeddings is None or embeddings.ndim != 2:
        raise UserError(f"{path} has no tensor `embeddings` of shape [C, d]")
    result = Classes(embeddings)
    if metadata.get("score") == "linear":
        result = Classes(embeddings, tensors.get("norms"), tensors.get("bias"))
        if result.norms is None or result.bias is None:
            raise UserError(
                f"{path} has a classifier's rows without their `norms` or `bias`: create it again"
            )
    if not all(torch.isfinite(tensor).all() for tensor in result if tensor is not None):
        raise UserError(f"{path} contains NaN or infinity: create the embeddings again")
    if "classes" not in metadata:
        if len(embeddings) != len(classes):
            raise UserError(
                f"{path} has {len(embeddings)} embeddings without names, but the data has "
                f"{len(classes)} classes: put the names into its metadata as `classes`"
            )
        return result
    try:
        names = json.loads(metadata["classes"])
    except ValueError as error:
        raise UserError(
            f"{path}: `classes` in its metadata is not JSON: write a list of names"
        ) from error
    if not isinstance(names, list) or len(names) != len(embeddings):
        raise UserError(
            f"{path}: `classes` must be a list of {len(embeddings)} names, one per embedding"
        )
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(
            f"{path} has no embedding of class '{missing[0]}' ({len(missing)} of {len(classes)} "
            "are missing)"
        )
    order = [names.index(name) for name in classes]
    return Classes(*(None if tensor is None else tensor[order] for tensor in result))
