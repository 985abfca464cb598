"""Class embeddings of a CLIP's text tower or of a teacher's classifier, written into a bundle or
any folder.
"""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError, suggest
from contract.files import write_atomically
from contract.manifest import MANIFEST, TeacherRecord, add_files, read_manifest
from contract.text_encoder import TEXT_ENCODER
from export.text.classifier_rows import classifier_rows
from export.text.options import TextOptions
from export.text.tower import (
    Label,
    class_embeddings,
    open_tower,
    read_labels,
    read_templates,
    tokenize,
)

if TYPE_CHECKING:  # mistakes in labels and options must not wait for torch to load
    from torch import Tensor

_FORMAT = 1
"""Version of class_embeddings.safetensors' metadata."""

_EMBEDDINGS = "class_embeddings.safetensors"


def write_embeddings(options: TextOptions) -> None:
    """Write class_embeddings.safetensors and, if requested, the text encoder into a folder.

    Nothing is written before everything has succeeded. Raises UserError for labels, weights, a
    teacher or an output that do not fit.
    """
    labels, templates = read_labels(options.labels), read_templates(options.templates)
    _check_writable(options.output)
    # also reads the manifest, so that a damaged bundle is reported before the work
    spaces = _teacher_spaces(options)
    if options.classifier:
        _write_classifier(options, labels)
        return
    if options.with_encoder and (
        missing := [m for m in ("onnxscript", "onnxruntime") if not importlib.util.find_spec(m)]
    ):
        raise UserError(
            f"--with-encoder needs {' and '.join(missing)}: pip install 'vfm-distill[text]'"
        )
    tower = open_tower(options.model, options.pretrained)
    tokens = tokenize(tower.tokenizer, tower.context, labels, templates, options.labels)
    files = {}
    if options.with_encoder:
        from export.text.encoder import encoder_files

        files = encoder_files(tower, tokens)
    embeddings = class_embeddings(tower.model.encode_text, tokens, labels, options.batch_size)
    if spaces and embeddings.shape[1] not in (widths := [t.token_dim for t in spaces]):
        raise UserError(
            f"--model {options.model}: its embeddings are {embeddings.shape[1]}-d, the bundle's "
            f"'{spaces[0].label}' tokens {widths[0]}-d: give the CLIP that was the teacher, or "
            "its teacher's label with --teacher"
        )
    for space in spaces:
        _compare_activations(space, bool(tower.about["quick_gelu"]))
    about = (
        tower.about
        | {
            "format": _FORMAT,
            "classes": [label.name for label in labels],
            "labels": [label.words for label in labels],
            "templates": templates,
        }
        | ({"teacher": options.teacher} if options.teacher else {})
    )
    _write_files(options.output, files, {"embeddings": embeddings}, about)
    signed = add_files(options.output, [_EMBEDDINGS, *files])
    print(
        f"labels    {len(labels)}, each in {len(templates)} sentences: embeddings "
        f"{list(embeddings.shape)}"
    )
    for name in (_EMBEDDINGS, *files):
        print(f"wrote     {options.output / name}")
    if not files and (options.output / TEXT_ENCODER).exists():
        print(
            f"note      {TEXT_ENCODER} and its graph were kept: add --with-encoder if they are of "
            "another model"
        )
    if signed:
        _say_unsigned(options.output)
    print("next      score a student distilled from this CLIP, in that teacher's space:")
    print(
        "  python -m distill.evaluate RUN --tasks zero-shot "
        f"zero_shot.embeddings={options.output / _EMBEDDINGS} --features clip --data ROOT"
    )


def _teacher_spaces(options: TextOptions) -> list[TeacherRecord]:
    """The CLIP teachers, or the named one, of the bundle at `output`; none where it is any other
    folder.
    """
    if not (options.output / MANIFEST).exists():
        return []
    manifest = read_manifest(options.output)
    labels = [t.label for t in manifest.teachers]
    teacher = options.classifier or options.teacher
    if teacher and teacher not in labels:
        raise UserError(f"the bundle has no teacher '{teacher}': {suggest(teacher, labels)}")
    return [t for t in manifest.teachers if (t.label == teacher if teacher else t.role == "clip")]


def _compare_activations(teacher: TeacherRecord, quick: bool) -> None:
    """Print a note if the text tower has another activation than the CLIP that taught."""
    # the ResNets' own activation is ReLU, their text towers all have QuickGELU
    if re.match(r"resnet\d+(x\d+)?_clip", teacher.network) and not quick:
        print(
            f"note      the text tower computes GELU, but that of the teacher '{teacher.label}' "
            f"({teacher.network}) QuickGELU: give the variant of --model with -quickgelu"
        )
    taught = "_quickgelu_" in teacher.network
    # other image towers (SigLIP's, EVA's) come in one variant
    if "_clip_" in teacher.network and teacher.network.startswith("vit_") and taught != quick:
        names = ("GELU", "QuickGELU")
        print(
            f"note      the text tower computes {names[quick]}, but the teacher "
            f"'{teacher.label}' ({teacher.network}) {names[taught]}: their spaces differ; give the "
            f"variant of --model {'with' if taught else 'without'} -quickgelu, or train from the "
            "teacher's other variant"
        )


def _write_classifier(options: TextOptions, labels: list[Label]) -> None:
    tensors, about = classifier_rows(options.run, options.classifier, labels, options.labels)
    _write_files(options.output, {}, tensors, about | {"format": _FORMAT})
    signed = add_files(options.output, [_EMBEDDINGS])
    print(
        f"classes   {len(labels)} rows of the classifier of '{options.classifier}': "
        f"{list(tensors['embeddings'].shape)}"
    )
    print(f"wrote     {options.output / _EMBEDDINGS}")
    if signed:
        _say_unsigned(options.output)
    if (options.output / MANIFEST).exists():
        print("next      serve them:")
        print(f"  python -m serve.run {options.output}")


def _say_unsigned(bundle: Path) -> None:
    print("note      the bundle has changed, so its signature was removed; sign it again:")
    print(f"  python -m export.sign {bundle} --key KEY")


def _check_writable(folder: Path) -> None:
    """Raise UserError for an output that cannot be created or written into, before the work."""
    parent = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not parent.is_dir():
        raise UserError(f"--output {folder}: {parent} is not a folder (choose another)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: no permission to write into {parent} (choose another)")


def _write_files(
    folder: Path, files: dict[str, bytes], tensors: dict[str, "Tensor"], about: dict
) -> None:
    """Write the encoder's files and then the embeddings, each by rename; an old file is replaced
    whole or not at all.
    """
    from safetensors.torch import save

    from distill.models.weights import tensors_sha256

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, lambda temporary, data=data: temporary.write_bytes(data))
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    # not save_file: only the owner could read its file, and servers run as another user
    data = save(tensors, metadata | {"sha256": tensors_sha256(tensors)})
    write_atomically(folder / _EMBEDDINGS, lambda temporary: temporary.write_bytes(data))
