"""`python -m export.check`: verify that a bundle is complete, valid and as its manifest says."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from contract.bundle_check import encoder_problem, graph_problem
from contract.command_line import CommandLine
from contract.detection import read_tokenizer
from contract.errors import UserError, exit_status
from contract.golden import GOLDEN, read_golden
from contract.manifest import (
    BundledEngine,
    Manifest,
    manifest_bytes,
    read_manifest,
)
from contract.signature import FUSED
from contract.signing import PublicKey, add_trust, signer
from contract.tables import print_table
from contract.text_encoder import TEXT_ENCODER
from contract.untrusted import open_file, parse_json, read_tensors
from export.bundle_files import verify_files

EPILOG = """\
examples:
  python -m export.check bundles/quickstart
  python -m export.check bundles/quickstart --trust public.pem

Verifies
  files    the sha256 of every file, and that there are no others
  graphs   onnx.checker, opset, and the names, types and shapes of inputs and
           outputs and the types of weights, against the manifest; the text
           encoder against its own description; the detector's vocabulary
  tensors  the golden set and the class embeddings
  engines  every engine's sidecar
  parity   the recorded comparisons with the student
  signed   with --trust, that one of these keys has signed the manifest

Exit status: 0 everything is correct, 1 something is wrong, 2 not a bundle, or
not signed by a key of --trust.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.check", description="Verify a bundle of export.run.", epilog=EPILOG
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    add_trust(parser)
    args = parser.parse_args(arguments)
    return exit_status(lambda: check(args.bundle, args.trust))


def check(bundle: Path, trust: Sequence[Path] = ()) -> int:
    """Verify a bundle and print a table; returns 0 if everything is correct, else 1.

    Raises UserError for a folder that is not a bundle, and for one that none of the public keys to
    `trust` has signed.
    """
    from rich.text import Text

    keys = [PublicKey(path) for path in trust]
    data = manifest_bytes(bundle)
    key = signer(bundle, data, keys)
    manifest = read_manifest(bundle, data)
    rows = [("file", name, problem) for name, problem in verify_files(bundle, manifest).items()]
    if key:
        rows.append(("signed", str(trust[keys.index(key)]), ""))
    rows += [
        ("graph", graph.name, graph_problem(bundle, manifest, graph)) for graph in manifest.graphs
    ]
    if detector := manifest.detector:
        rows += [
            ("graph", graph.name, graph_problem(bundle, manifest, graph))
            for graph in detector.graphs
        ]
        rows.append(("detector", detector.vocabulary, _detector_problem(bundle, manifest)))
    for name in manifest.files:
        if name == TEXT_ENCODER:
            rows.append(("graph", "text_encoder", encoder_problem(bundle, manifest, name)))
        elif name.endswith(".safetensors"):
            rows.append(("tensors", name, _tensors_problem(bundle / name, manifest)))
    rows += [
        ("engine", entry.file, _engine_problem(bundle, manifest, entry))
        for entry in manifest.engines
    ]
    failed = [row for row in manifest.parity if not row.passed]
    worst = min((row.cosine for row in manifest.parity), default=1.0)
    message = f"{len(failed)} comparisons failed, least cosine {worst:.6f}" if failed else ""
    rows.append(
        ("parity", f"{len(manifest.parity)} comparisons, least cosine {worst:.6f}", message)
    )
    table = []
    for kind, name, problem in rows:
        # names of files that do not belong here may hold anything
        shown = name.encode(errors="backslashreplace").decode()
        verdict = (Text("wrong", "red"), Text(problem, "red")) if problem else ("ok",)
        table.append((kind, shown, *verdict))
    print_table(("what", "name", "verdict"), table, left=("name", "verdict"))
    print(f"view      {manifest.view}")
    if manifest.licences is None:
        print("inherits  not recorded: this bundle is of an earlier version")
    for record in manifest.licences or ():
        print(f"inherits  {record.words}")
    wrong = sum(bool(problem) for _, _, problem in rows)
    print(
        f"{bundle}: {'all checks passed' if not wrong else f'{wrong} of {len(rows)} checks failed'}"
    )
    return 1 if wrong else 0


def _detector_problem(bundle: Path, manifest: Manifest) -> str:
    """What is wrong with a detector's vocabulary, and with what it reads, "" if nothing is."""
    detector = manifest.detector
    if detector.vocabulary not in manifest.files:
        return "its file is not in the manifest"
    outputs = {tensor.name: tensor for graph in manifest.graphs for tensor in graph.outputs}
    inputs = {tensor.name: tensor for tensor in detector.boxes.inputs}
    for name in detector.maps:
        if name not in outputs or outputs[name] != inputs.get(name):
            return f"the detector reads '{name}', which no graph gives in that form"
    try:
        open_file(bundle / detector.vocabulary).close()  # nobody waits for a pipe
        read_tokenizer(bundle / detector.vocabulary)
    except ImportError:
        return "cannot be read without tokenizers: pip install tokenizers"
    except ValueError as error:
        return str(error)
    return ""


def _tensors_problem(path: Path, manifest: Manifest) -> str:
    """What is wrong with a file of tensors (golden set, class embeddings, or another), "" if
    nothing is.
    """
    try:
        about, tensors = read_tensors(path)
        if path.name == "class_embeddings.safetensors":
            classes, rows = len(parse_json(about["classes"])), len(tensors["embeddings"])
            if classes != rows:
                return f"{rows} embeddings for {classes} classes"
        if path.name == GOLDEN:
            if lacking := _missing_outputs(tensors, manifest):
                return f"lacks {', '.join(lacking)}"
            read_golden(path)
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    odd = [
        name
        for name, value in tensors.items()
        if value.dtype.kind == "f" and not np.isfinite(value).all()
    ]
    return f"'{odd[0]}' holds numbers that are not finite" if odd else ""


def _missing_outputs(tensors: Iterable[str], manifest: Manifest) -> list[str]:
    """Input and outputs of `fused` that a golden set lacks."""
    fused = next((graph for graph in manifest.graphs if graph.name == FUSED), None)
    if fused is None:
        return [FUSED]
    return sorted({tensor.name for tensor in (*fused.inputs, *fused.outputs)} - set(tensors))


def _engine_problem(bundle: Path, manifest: Manifest, entry: BundledEngine) -> str:
    """What is wrong with an engine and its sidecar, "" if nothing is."""
    from export.tensorrt.build import verify_engine

    if entry.file not in manifest.files:
        return "its file is not in the manifest"
    if entry.graph not in {graph.name for graph in manifest.graphs}:
        return f"the bundle has no graph '{entry.graph}'"
    try:
        record = verify_engine(bundle / entry.file)
    except UserError as error:
        return str(error)
    return "" if record == entry.record else "its sidecar differs from the manifest"


if __name__ == "__main__":
    sys.exit(main())
