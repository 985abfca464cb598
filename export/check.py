"""`python -m export.check`: is a bundle whole, valid and what its manifest says?"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import exit_status

EPILOG = """\
examples:
  python -m export.check bundles/quickstart

Verifies the sha256 of every file, each graph (onnx.checker, opset, names, types and shapes of inputs and outputs against the
manifest), the recorded parity, and every engine's sidecar. Exit status: 0 all well, 1 something is wrong, 2 no bundle.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.check",
        description="Verify a bundle of export.run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    asked = parser.parse_args(arguments)
    return exit_status(lambda: check(asked.bundle))


def check(bundle: Path) -> int:
    """Verify and print a table; returns 0 where everything is well, else 1."""
    from rich.console import Console
    from rich.table import Table

    from export.bundle import read_manifest, verify_files

    manifest = read_manifest(bundle)
    rows = [("file", name, problem) for name, problem in verify_files(bundle, manifest).items()]
    rows += [("graph", graph.name, graph_problem(bundle, graph)) for graph in manifest.graphs]
    rows += [("engine", entry["file"], engine_problem(bundle / entry["file"], entry)) for entry in manifest.engines]
    failed = [row for row in manifest.parity if not row.passed]
    worst = min((row.cosine for row in manifest.parity), default=1.0)
    said = f"{len(failed)} comparisons failed, least cosine {worst:.6f}" if failed else ""
    rows.append(("parity", f"{len(manifest.parity)} comparisons, least cosine {worst:.6f}", said))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what", "name", "verdict"):
        table.add_column(name, overflow="fold")
    for kind, name, problem in rows:
        table.add_row(kind, name, f"[red]{problem}[/red]" if problem else "ok")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    wrong = sum(bool(problem) for _, _, problem in rows)
    print(f"{bundle}: {'all well' if not wrong else f'{wrong} of {len(rows)} checks failed'}")
    return 1 if wrong else 0


def graph_problem(bundle: Path, record) -> str:  # noqa: ANN001 - a GraphRecord
    """What is wrong with a graph's file, "" where nothing is."""
    import onnx

    path = bundle / record.file
    if not path.is_file():
        return "its file is missing"
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
    # protobuf, checker and shape inference each raise their own
    except Exception as error:
        return f"not valid ONNX ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset != record.opset:
        return f"opset {opset}, the manifest says {record.opset}"
    for values, tensors in ((model.graph.input, record.inputs), (model.graph.output, record.outputs)):
        found = [describe(value) for value in values]
        wanted = [(t.name, t.dtype, tuple(t.shape)) for t in tensors]
        if found != wanted:
            return f"{found} where the manifest says {wanted}"
    return ""


def engine_problem(path: Path, entry: dict) -> str:
    """What is wrong with an engine and its sidecar, "" where nothing is."""
    from distill.errors import UserError
    from export.to_tensorrt import verify_engine

    try:
        record = verify_engine(path).model_dump(mode="json")
    except UserError as error:
        return str(error)
    listed = {key: value for key, value in entry.items() if key not in ("graph", "file")}
    return "" if record == listed else "its sidecar says something else than the manifest"


def describe(value) -> tuple[str, str, tuple[int | str, ...]]:  # noqa: ANN001 - a ValueInfoProto
    """Name, element type and shape of a graph's input or output."""
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape


if __name__ == "__main__":
    sys.exit(main())
