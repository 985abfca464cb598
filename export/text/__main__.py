"""`python -m export.text`: CLIP's text side of zero-shot classification, for a bundle or for
distill.evaluate.

A student distilled from a CLIP teacher has its image embeddings; the text embeddings come from that
teacher's own text tower (open_clip). They are computed here once a class, and with `--with-encoder`
the tower itself goes along as ONNX. Where there is no CLIP teacher, `--classifier` takes the
classes of another teacher's own classifier (classifier_rows.py).
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, suggest
from contract.manifest import MANIFEST, add_files, read_manifest
from export.text.tower import (
    Label,
    TextTower,
    class_embeddings,
    open_tower,
    quiet,
    read_labels,
    read_templates,
    tokenize,
)

if TYPE_CHECKING:  # --help must not wait for torch to load
    from torch import Tensor, nn

EPILOG = """\
examples:
  python -m export.text --output bundles/mine --model ViT-B-16 --pretrained openai --labels labels.txt
  python -m export.text --output bundles/mine --model ViT-B-16-quickgelu --pretrained openai.safetensors --labels labels.txt
  python -m export.text --output bundles/mine --model ViT-L-14 --pretrained datacomp_xl_s13b_b90k --labels labels.txt \\
      --templates templates.txt --with-encoder
  python -m export.text --output /tmp/trial --model ViT-B-16 --pretrained random --labels labels.txt
  python -m export.text --output bundles/quickstart --classifier cls --run runs/quickstart --labels imagenet.txt

labels.txt: a class a line, named as in the data (its folder); NAME<tab>WORDS where one would say it otherwise:
  n02099601<tab>golden retriever
templates.txt: a sentence a line with {} for the label, as `a photo of a {}.`; default: eight general ones.
--model is open_clip's name, or a .json file of its own kind of configuration. Take the model and weights of the
run's CLIP teacher: embeddings of another CLIP are of another space. In a FILE, OpenAI's, DFN's and MetaCLIP's weights
want the model's -quickgelu variant (a tag knows that by itself).
--classifier is for runs without a CLIP teacher: labels are ImageNet's own (`tabby cat`, `espresso`, n02123045), each
represented by its row in the classifier of that teacher of RUN. What it says is the classifier's logits, read from the
student's <teacher>_token: a closed vocabulary that the teacher was trained on, no text encoder, nothing zero-shot about it.

writes class_embeddings.safetensors; with --with-encoder also text_encoder.onnx (token ids int64 [B, context] ->
text_embedding float32 [B, d], normalised), text_encoder.json and the vocabulary its tokens come from.
Exit status: 0 done, 2 a mistake in what was asked, 1 a failure.
"""

FORMAT = 1
"""Version of class_embeddings.safetensors' metadata and of text_encoder.json."""

EMBEDDINGS, GRAPH, SIDECAR = (
    "class_embeddings.safetensors",
    "text_encoder.onnx",
    "text_encoder.json",
)
INPUT, OUTPUT, OPSET = "token_ids", "text_embedding", 20
MIN_COSINE = 0.99999
"""Between the graph's and torch's embedding of one text, in float32."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.text",
        description="Write the text embeddings of class labels, and the text tower itself, for "
        "zero-shot classification.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a bundle, or any folder; made if missing"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="open_clip's name of the CLIP teacher, or a .json configuration",
    )
    parser.add_argument(
        "--pretrained",
        metavar="TAG|FILE|random",
        help="open_clip's tag of the weights, or a local file",
    )
    parser.add_argument(
        "--classifier",
        metavar="LABEL",
        help="instead of a CLIP: RUN's teacher whose classifier to use",
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="run folder of distill.run, for --classifier"
    )
    parser.add_argument(
        "--teacher",
        metavar="LABEL",
        help="the bundle's CLIP teacher, if it has several of one width",
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="a class a line")
    parser.add_argument(
        "--templates", type=Path, metavar="FILE", help="a sentence with {} a line (default: eight)"
    )
    parser.add_argument(
        "--with-encoder",
        action="store_true",
        help="the text tower as ONNX too, for new labels later",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="prompts at a time (64)"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed command line; nothing is written before all of it has succeeded."""
    needed = ("classifier", "run") if args.classifier or args.run else ("model", "pretrained")
    for option in ("output", *needed, "labels"):
        if getattr(args, option) is None:
            raise UserError(
                f"no --{option}: it is needed (python -m export.text --help has examples)"
            )
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give 1 or more")
    labels, templates, spaces = read_labels(args.labels), read_templates(args.templates), []
    check_folder(args.output)
    if (args.output / MANIFEST).exists():
        manifest = read_manifest(
            args.output
        )  # a damaged bundle is said before the work, not after it
        teachers, teacher = [t.label for t in manifest.teachers], args.classifier or args.teacher
        if teacher and teacher not in teachers:
            raise UserError(
                f"teacher '{teacher}' is none of the bundle's: {suggest(teacher, teachers)}"
            )
        spaces = [
            t for t in manifest.teachers if (t.label == teacher if teacher else t.role == "clip")
        ]
    if args.classifier:
        return write_classifier(args, labels)
    if args.with_encoder and (
        lacking := [m for m in ("onnxscript", "onnxruntime") if not importlib.util.find_spec(m)]
    ):
        raise UserError(
            f"--with-encoder needs {' and '.join(lacking)}: pip install 'vfm-distill[text]'"
        )
    tower = open_tower(args.model, args.pretrained)
    tokens = tokenize(tower.tokenizer, tower.context, labels, templates, args.labels)
    files = encoder_files(tower, tokens) if args.with_encoder else {}
    embeddings = class_embeddings(tower.model.encode_text, tokens, labels, args.batch_size)
    if spaces and embeddings.shape[1] not in (widths := [t.token_dim for t in spaces]):
        raise UserError(
            f"--model {args.model}: its embeddings are {embeddings.shape[1]}-d, the bundle's "
            f"'{spaces[0].label}' tokens {widths[0]}-d: give the CLIP that was the teacher, or "
            "its teacher's label with --teacher"
        )
    about = (
        tower.about
        | {
            "format": FORMAT,
            "classes": [label.name for label in labels],
            "labels": [label.words for label in labels],
            "templates": templates,
        }
        | ({"teacher": args.teacher} if args.teacher else {})
    )
    write_files(args.output, files, {"embeddings": embeddings}, about)
    add_files(args.output, [EMBEDDINGS, *files])
    print(
        f"labels    {len(labels)}, each in {len(templates)} sentences: embeddings "
        f"{list(embeddings.shape)}"
    )
    for name in (EMBEDDINGS, *files):
        print(f"wrote     {args.output / name}")
    if not files and (args.output / SIDECAR).exists():
        print(
            f"note      {SIDECAR} and its graph are as they were: if of another model, add "
            "--with-encoder"
        )
    print("next      score a student distilled from this CLIP, in that teacher's space:")
    print(
        "  python -m distill.evaluate RUN --tasks zero-shot "
        f"zero_shot.embeddings={args.output / EMBEDDINGS} --features clip --data ROOT"
    )
    return 0


def write_classifier(args: argparse.Namespace, labels: list[Label]) -> int:
    """Write the classes of a teacher's own classifier; UserError for options that are CLIP's."""
    from export.text.classifier_rows import classifier_rows

    for option in ("model", "pretrained", "templates", "teacher", "with_encoder"):
        if getattr(args, option):
            raise UserError(
                f"--{option.replace('_', '-')} is for a CLIP, --classifier has no text: leave one "
                "of them out"
            )
    tensors, about = classifier_rows(args.run, args.classifier, labels, args.labels)
    write_files(args.output, {}, tensors, about | {"format": FORMAT})
    add_files(args.output, [EMBEDDINGS])
    print(
        f"classes   {len(labels)} rows of the classifier of '{args.classifier}': "
        f"{list(tensors['embeddings'].shape)}"
    )
    print(f"wrote     {args.output / EMBEDDINGS}")
    if (args.output / MANIFEST).exists():
        print("next      serve them:")
        print(f"  python -m serve.run {args.output}")
    return 0


def check_folder(folder: Path) -> None:
    """Raise UserError for an output that cannot be made or written into: said before the work, not
    after it.
    """
    parent = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not parent.is_dir():
        raise UserError(f"--output {folder}: {parent} is no folder (choose another)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: no permission to write into {parent} (choose another)")


def encoder_files(tower: TextTower, tokens: "Tensor") -> dict[str, bytes]:
    """The text tower as ONNX, its vocabulary, and what a client must know to use both without
    torch: name -> contents.

    The graph maps `token_ids` int64 [B, context] to `text_embedding` float32 [B, d], normalised; it
    is checked, and compared with torch through onnxruntime on rows of `tokens` [N, context] at
    batch 1 and 3. Raises UserError where the tower exceeds the 2 GB of an ONNX file or the graph
    computes something else.
    """
    import onnx
    import torch
    from open_clip.tokenizer import default_bpe

    size = sum(tensor.nbytes for tensor in tower.model.state_dict().values())
    if size > 2**31 - 2**24:
        raise UserError(
            f"--with-encoder: the text tower is {size / 1e9:.1f} GB, an ONNX file holds 2 (leave "
            "the option out)"
        )
    print("encoder   tracing and comparing the text tower …", flush=True)
    graph = text_graph(tower)
    parity = compare(tower, graph, tokens)
    vocabulary = Path(default_bpe())
    contents = {vocabulary.name: vocabulary.read_bytes(), GRAPH: graph}
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    tokenizer = tower.tokenizer
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    sidecar = {
        "format": FORMAT,
        **tower.about,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "parity": parity,
        "graph": {"file": GRAPH, "sha256": sha256[GRAPH], "opset": OPSET},
        "input": {"name": INPUT, "dtype": "int64", "shape": ["batch", tower.context]},
        "output": {
            "name": OUTPUT,
            "dtype": "float32",
            "shape": ["batch", parity.pop("dim")],
            "normalized": True,
        },
        "tokenizer": {
            "kind": "clip-bpe",
            "vocabulary": {"file": vocabulary.name, "sha256": sha256[vocabulary.name]},
            "vocabulary_size": tokenizer.vocab_size,
            "context_length": tower.context,
            "pattern": tokenizer.pat.pattern,
            "clean": tokenizer.clean_fn.__name__.removeprefix("_clean_"),
            "pad_id": 0,
            "start": {"token": tokenizer.decoder[start], "id": start},
            "end": {"token": tokenizer.decoder[end], "id": end},
        },
    }
    return contents | {SIDECAR: json.dumps(sidecar, indent=2).encode()}


def text_graph(tower: TextTower) -> bytes:
    """The bytes of a checked ONNX graph of dynamic batch, without the exporter's stack traces and
    local paths.
    """
    import onnx
    import torch
    import torch.nn.functional as F

    class Normalised(torch.nn.Module):
        def __init__(self, model: "nn.Module") -> None:
            super().__init__()
            self.model = model

        def forward(self, token_ids: "Tensor") -> "Tensor":
            return F.normalize(self.model.encode_text(token_ids), dim=-1)

    example = tower.tokenizer(["two", "sentences"], context_length=tower.context)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Normalised(tower.model).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    proto = program.model_proto
    graph = proto.graph
    for part in (
        proto,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if opsets != [OPSET]:  # the exporter may silently write another than was asked for
        raise RuntimeError(f"the exporter wrote opset {opsets}, not {OPSET}")
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def compare(tower: TextTower, graph: bytes, tokens: "Tensor") -> dict[str, float | int]:
    """Least cosine and largest difference of the graph from torch, and the embeddings' dim;
    UserError past tolerance.
    """
    import onnxruntime
    import torch
    import torch.nn.functional as F

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    cosine, error, dim = 1.0, 0.0, 0
    for rows in (
        tokens[:1],
        tokens[[0, len(tokens) // 2, -1]],
    ):  # of different lengths, where labels are
        with torch.inference_mode():
            expected = F.normalize(tower.model.encode_text(rows).float(), dim=-1)
        result = torch.from_numpy(session.run([OUTPUT], {INPUT: rows.numpy()})[0])
        cosine = min(cosine, F.cosine_similarity(result, expected).min().item())
        error, dim = max(error, (result - expected).abs().max().item()), expected.shape[1]
    if not cosine >= MIN_COSINE:  # NaN fails too
        raise UserError(
            f"--with-encoder: the ONNX text tower differs from torch (cosine {cosine:.6f}, wanted "
            f"{MIN_COSINE}): leave the option out, or try other versions of torch and onnxruntime"
        )
    return {"cosine": cosine, "max_abs_error": error, "dim": dim}


def write_files(
    folder: Path, files: dict[str, bytes], tensors: dict[str, "Tensor"], about: dict
) -> None:
    """Write the encoder's files and then the embeddings, each by rename; an old file is replaced
    whole or not at all.
    """
    from safetensors.torch import save

    from contract.files import write_atomically
    from distill.models.weights import tensors_sha256

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, lambda temporary, data=data: temporary.write_bytes(data))
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    # not save_file: its file is readable by its owner alone, and a server runs as another user
    data = save(tensors, metadata | {"sha256": tensors_sha256(tensors)})
    write_atomically(folder / EMBEDDINGS, lambda temporary: temporary.write_bytes(data))


if __name__ == "__main__":
    sys.exit(main())
