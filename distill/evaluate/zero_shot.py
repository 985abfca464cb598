"""Zero-shot classification: the class whose embedding is nearest in cosine (CLIP's protocol, KPU Table 1)."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.errors import UserError
from distill.evaluate.classification import accuracy
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import CentreViews, extract
from distill.evaluate.outcome import Outcome


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig, cache: Path) -> Outcome:
    """Top-1 and top-5 of the validation split; the embeddings are in the space of the features (`--features clip`)."""
    if not config.zero_shot.embeddings:
        raise UserError(
            "zero-shot needs class embeddings: set zero_shot.embeddings=FILE.safetensors (tensor `embeddings` [C, d], "
            "metadata `classes`: a JSON list of the class folders' names)"
        )
    val = open_classes(data, "val")
    embeddings = read_embeddings(Path(config.zero_shot.embeddings), val.classes)
    if embeddings.shape[1] != encoder.dims.summary:
        raise UserError(
            f"{config.zero_shot.embeddings} holds {embeddings.shape[1]}-d embeddings, {encoder.name}'s '{encoder.read_out}' "
            f"features are {encoder.dims.summary}-d: choose the head of the teacher they come from (--features clip, say)"
        )
    views = CentreViews(val, encoder.image_size, config.extract.crop)
    features = extract(encoder, views, cache, config.extract, what="val split").summaries()
    scores, report = accuracy(cosine_scores(features, embeddings), torch.from_numpy(val.labels), val.classes)
    return Outcome(scores, {"per_class": report})


def cosine_scores(features: Tensor, embeddings: Tensor) -> Tensor:
    """Cosine [n, C] of features [n, d] and class embeddings [C, d]."""
    return F.normalize(features.float(), dim=1) @ F.normalize(embeddings.float(), dim=1).T


def read_embeddings(path: Path, classes: tuple[str, ...]) -> Tensor:
    """Embeddings [C, d] in the order of `classes`; raises UserError for a damaged file or classes it lacks."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            embeddings = file.get_tensor("embeddings") if "embeddings" in file.keys() else None  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"zero_shot.embeddings = {path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error})") from error
    if embeddings is None or embeddings.ndim != 2:
        raise UserError(f"{path} has no tensor `embeddings` of shape [C, d]")
    if not torch.isfinite(embeddings).all():
        raise UserError(f"{path} holds NaN or infinity: make the embeddings again")
    if "classes" not in metadata:
        if len(embeddings) != len(classes):
            raise UserError(
                f"{path} holds {len(embeddings)} embeddings without names, the data has {len(classes)} classes: put the "
                "names into its metadata as `classes`"
            )
        return embeddings
    try:
        names = json.loads(metadata["classes"])
    except ValueError as error:
        raise UserError(f"{path}: `classes` in its metadata is not JSON: write a list of names") from error
    if not isinstance(names, list) or len(names) != len(embeddings):
        raise UserError(f"{path}: `classes` must be a list of {len(embeddings)} names, one an embedding")
    lacking = [name for name in classes if name not in names]
    if lacking:
        raise UserError(
            f"{path} has no embedding of class '{lacking[0]}' ({len(lacking)} of {len(classes)} are missing)"
        )
    return embeddings[[names.index(name) for name in classes]]
