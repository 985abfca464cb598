"""The command line of `python -m serve.client`: pictures in; arrays, and pictures of them, out."""

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from serve.client import FeatureClient
from serve.client.calls import Options
from serve.client.retry import Retry
from serve.client.sync import DEFAULT_URL
from serve.client.tls import add_tls, asked_tls
from serve.errors import NotAllowed, Unavailable

EPILOG = """\
examples:
  python -m serve.client photo.jpg
  python -m serve.client a.jpg b.jpg --outputs backbone_global clip_token --format safetensors --output features
  python -m serve.client photo.jpg --task segmentation
  python -m serve.client photo.jpg --task depth --side client
  python -m serve.client photo.jpg --task zero-shot --labels "a cat" "a dog" "a cup of coffee"
  python -m serve.client photo.jpg --task zero-shot --side client --embeddings bundles/mine/class_embeddings.safetensors
  python -m serve.client *.jpg --encoded --partial --url gpu-server:8001 --ssl --ssl-root ca.pem

Writes DIR/TASK.npz (or .safetensors), a row a picture, and PNGs beside it: features as principal components; classes as a
map and laid over the photograph; depth with its scale; the likeliest classes as bars. Pictures are resized to the model's
size, whatever their shape.
Exit status: 0 done, 2 a mistake in what was asked, 1 no server there or another failure.
"""

TASKS = ("features", "segmentation", "depth", "zero-shot")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    return exit_status(lambda: run(args))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = Options()
    result = CommandLine(
        prog="python -m serve.client",
        description="Ask a running server for features, segmentation, depth or zero-shot classes "
        "of pictures.",
        epilog=EPILOG,
    )
    result.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files"
    )
    result.add_argument("--task", default="features", choices=TASKS, help="(features)")
    result.add_argument(
        "--outputs", nargs="+", metavar="NAME", help="features: which (default: all)"
    )
    result.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="zero-shot: classes (the bundle's; others: with a CLIP)",
    )
    result.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="zero-shot --side client: export.text's file",
    )
    result.add_argument(
        "--side",
        default="server",
        choices=("server", "client"),
        help="where a task's head runs (server)",
    )
    result.add_argument(
        "--url", default=DEFAULT_URL, metavar="HOST:PORT", help=f"gRPC address ({DEFAULT_URL})"
    )
    result.add_argument(
        "--output",
        type=Path,
        default=Path("answers"),
        metavar="DIR",
        help="where to write (answers)",
    )
    result.add_argument(
        "--format", default="npz", choices=("npz", "safetensors"), help="of the arrays (npz)"
    )
    result.add_argument(
        "--encoded", action="store_true", help="send the files; the server decodes them"
    )
    result.add_argument("--size", metavar="HxW", help="pixels, for models that take many sizes")
    result.add_argument(
        "--partial", action="store_true", help="features: do without heads that fail"
    )
    result.add_argument(
        "--shm",
        nargs="?",
        const="system",
        choices=("system", "cuda"),
        help="shared memory (system)",
    )
    result.add_argument(
        "--admin-key",
        metavar="KEY",
        help="of the server's restricted endpoints; --shm wants it there",
    )
    result.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="S",
        help=f"seconds a request ({defaults.timeout:.0f})",
    )
    result.add_argument(
        "--retries", type=int, default=3, metavar="N", help="while the server is unavailable (3)"
    )
    result.add_argument(
        "--request-id", metavar="ID", help="as the server's log will have it (default: made up)"
    )
    add_tls(result)
    return result


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed command line."""
    wrote, outputs = answer(args)
    for path in wrote:
        print(f"wrote     {path}")
    print(f"next      {suggestion(args, outputs)}")
    return 0


def answer(args: argparse.Namespace) -> tuple[list[Path], Collection[str]]:
    """Ask and write; the files written, and the outputs that the server offers."""
    options = check(args)
    files = {
        path: args.output / path_name
        for path, path_name in zip(args.images, stems(args.images), strict=True)
    }
    try:
        with FeatureClient(args.url, **options) as client:
            wrote = TASK_COMMANDS[args.task](client, args, files)
            outputs = client.describe().outputs
    except Unavailable as error:
        if "connect" in error.message or "resolving" in error.message:
            raise type(error)(
                f"no server answers at {args.url}: start one with python -m serve.run BUNDLE, or "
                "name another with --url"
            ) from error
        raise
    except NotAllowed as error:
        error.message += " (see --ssl, --ssl-root, --ssl-certificate, --ssl-key, --admin-key)"
        raise
    return wrote, outputs


def check(args: argparse.Namespace) -> dict:
    """Options of the client; raises UserError for options that do not go together."""
    for path in args.images:
        if not path.is_file():
            raise UserError(f"image {path}: no such file")
    for name, task in (
        ("outputs", "features"),
        ("partial", "features"),
        ("labels", "zero-shot"),
        ("embeddings", "zero-shot"),
    ):
        if getattr(args, name) and args.task != task:
            raise UserError(f"--{name} is for --task {task}: leave it out, or choose that task")
    if args.task != "features" and args.side == "server" and args.encoded:
        raise UserError(
            f"--encoded goes with --task features or --side client: --task {args.task} takes pixels"
        )
    if args.task == "zero-shot" and (args.side == "client") != (args.embeddings is not None):
        raise UserError(
            "--task zero-shot --side client and --embeddings FILE go together: give both or none"
        )
    if args.timeout <= 0:
        raise UserError(f"--timeout {args.timeout}: give seconds above 0")
    if args.retries < 0:
        raise UserError(f"--retries {args.retries}: give 0 or more")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file: give a folder")
    return {
        "timeout": args.timeout,
        "retry": Retry(most=args.retries),
        "shared_memory": args.shm,
        "admin_key": args.admin_key,
        "tls": asked_tls(args),
    }


def call_options(args: argparse.Namespace) -> dict:
    """What every task passes on."""
    options = {"request_id": args.request_id, "encoded": args.encoded}
    if args.size:
        sides = args.size.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise UserError(f"--size {args.size}: write pixels, height x width: 448x336")
        options["size"] = tuple(int(side) for side in sides)
    return options


def features(
    client: FeatureClient, args: argparse.Namespace, files: Mapping[Path, Path]
) -> list[Path]:
    """Ask for outputs; write them, and their principal components where they are maps."""
    from serve.client.pictures import features_figure, save

    answer = client.features(args.images, args.outputs, partial=args.partial, **call_options(args))
    for name, reason in answer.missing.items():
        print(f"missing   {name}: {reason}")
    grids = {name: answer.grid(name) for name in answer if name.endswith("_patches")}
    for name, value in answer.items():
        grid = f", grid {grids[name][0]}x{grids[name][1]}" if name in grids else ""
        print(f"output    {name} {list(value.shape)}{grid}")
    facts = {"size": list(answer.size), "grids": {name: list(grid) for name, grid in grids.items()}}
    wrote = [write_arrays(args, "features", answer.arrays, facts)]
    for row, (path, stem) in enumerate(files.items() if grids else ()):
        maps = {
            name.removesuffix("_patches"): answer[name][row].reshape(*grid, -1)
            for name, grid in grids.items()
        }
        wrote.append(save(features_figure(photograph(path), maps), named(stem, "features")))
    return wrote


def segmentation(
    client: FeatureClient, args: argparse.Namespace, files: Mapping[Path, Path]
) -> list[Path]:
    """Segment; write the class maps, alone and over the photographs."""
    from serve.client.pictures import class_image, save, segmentation_figure
    from serve.client.tasks.segmentation import segment

    result = segment(client, args.images, side=args.side, **side_options(args))
    wrote = [
        write_arrays(
            args, "segmentation", {"class_map": result.class_map}, {"classes": list(result.classes)}
        )
    ]
    for path, stem, classes in zip(files, files.values(), result.class_map, strict=True):
        shares = np.bincount(classes.ravel(), minlength=len(result.classes)) / classes.size
        message = ", ".join(
            f"{result.classes[n]} {shares[n]:.0%}" for n in shares.argsort()[::-1][:3] if shares[n]
        )
        print(f"{path.name}: {message}")
        wrote.append(save(class_image(classes, len(result.classes)), named(stem, "classes")))
        wrote.append(
            save(
                segmentation_figure(photograph(path), classes, result.classes),
                named(stem, "segmentation"),
            )
        )
    return wrote


def depth(
    client: FeatureClient, args: argparse.Namespace, files: Mapping[Path, Path]
) -> list[Path]:
    """Estimate depth; write it, and a picture with its scale."""
    from serve.client.pictures import depth_figure, save
    from serve.client.tasks.depth import estimate_depth

    result = estimate_depth(client, args.images, side=args.side, **side_options(args))
    wrote = [write_arrays(args, "depth", {"depth": result.depth}, {"unit": result.unit})]
    for path, stem, values in zip(files, files.values(), result.depth, strict=True):
        print(f"{path.name}: {values.min():.2f} to {values.max():.2f} {result.unit}s")
        wrote.append(
            save(depth_figure(photograph(path), values, result.unit), named(stem, "depth"))
        )
    return wrote


def zero_shot(
    client: FeatureClient, args: argparse.Namespace, files: Mapping[Path, Path]
) -> list[Path]:
    """Classify; write probabilities, and bars of the likeliest classes."""
    from serve.client.pictures import save, zero_shot_figure
    from serve.client.tasks.zero_shot import classify

    result = classify(
        client,
        args.images,
        args.labels,
        side=args.side,
        embeddings=args.embeddings,
        **side_options(args),
    )
    wrote = [
        write_arrays(
            args,
            "zero_shot",
            {"probabilities": result.probabilities},
            {"classes": list(result.classes)},
        )
    ]
    for path, stem, row in zip(files, files.values(), result.probabilities, strict=True):
        message = ", ".join(
            f"{result.classes[n]} {row[n]:.1%}" for n in row.argsort(kind="stable")[::-1][:3]
        )
        print(f"{path.name}: {message}")
        wrote.append(
            save(zero_shot_figure(photograph(path), row, result.classes), named(stem, "zero_shot"))
        )
    return wrote


TASK_COMMANDS = {
    "features": features,
    "segmentation": segmentation,
    "depth": depth,
    "zero-shot": zero_shot,
}


def side_options(args: argparse.Namespace) -> dict:
    """Options of a task: on the server's side none is about features."""
    options = call_options(args)
    return (
        options
        if args.side == "client"
        else {key: options[key] for key in options if key != "encoded"}
    )


def photograph(path: Path):
    """The picture itself, for pictures of answers; it was decoded once before, or by the server."""
    from contract.images import Limits
    from serve.client.inputs import Picture

    return Picture(path, str(path)).open(Limits())


def stems(paths: Sequence[Path]) -> list[str]:
    """Names of pictures' files, told apart where two are the same."""
    result: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in result:
            name, number = f"{path.stem}_{number}", number + 1
        result.append(name)
    return result


def named(stem: Path, what: str) -> Path:
    """DIR/photo.1_depth.png for DIR/photo.1."""
    return stem.with_name(f"{stem.name}_{what}.png")


def write_arrays(
    args: argparse.Namespace, name: str, arrays: Mapping[str, np.ndarray], facts: dict
) -> Path:
    """DIR/NAME.npz or .safetensors: arrays, and what they mean (in the npz as arrays, else as JSON
    metadata).
    """
    facts = {"images": [str(path) for path in args.images], **facts}
    path = args.output / f"{name}.{args.format}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if args.format == "npz":
            texts = {
                key: np.array(json.dumps(value) if isinstance(value, dict) else value)
                for key, value in facts.items()
            }
            np.savez(path, **arrays, **texts)
        else:
            from safetensors.numpy import save_file

            ordered = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            save_file(ordered, path, {key: json.dumps(value) for key, value in facts.items()})
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} (choose another --output)"
        ) from error
    return path


def suggestion(args: argparse.Namespace, outputs: Collection[str]) -> str:
    """The next command to type: another task that the server has."""
    there = {
        "features": True,
        "segmentation": "segmentation_logits" in outputs,
        "depth": "depth" in outputs,
    }
    tasks = [task for task in there if there[task] or task == args.task]
    place = tasks.index(args.task) if args.task in tasks else -1
    url = f" --url {args.url}" if args.url != DEFAULT_URL else ""
    images, output = (
        " ".join(map(str, args.images)),
        "" if args.output == Path("answers") else f" --output {args.output}",
    )
    return f"python -m serve.client {images} --task {tasks[(place + 1) % len(tasks)]}{output}{url}"


if __name__ == "__main__":
    sys.exit(main())
