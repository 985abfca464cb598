"""The command line of `python -m serve.client`: pictures in; arrays, and pictures of them, out."""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.command_line import CommandLine, read_size
from contract.errors import UserError, exit_status
from contract.tasks import map_tasks
from serve.client import FeatureClient
from serve.client.many import expand
from serve.client.options import ClientOptions, RequestOptions
from serve.client.retry import Retry
from serve.client.sync import DEFAULT_URL
from serve.client.tls import add_tls, read_tls
from serve.errors import NotAllowed, Unavailable, with_remedy

if TYPE_CHECKING:
    from serve.client.commands import Answered

EPILOG = """\
examples:
  python -m serve.client photo.jpg
  python -m serve.client a.jpg b.jpg --outputs backbone_global clip_token \\
      --format safetensors --output features
  python -m serve.client photos/ --task segmentation
  python -m serve.client photo.jpg --task depth --side client
  python -m serve.client photo.jpg --task zero-shot \\
      --labels "a cat" "a dog" "a cup of coffee"
  python -m serve.client photo.jpg --task zero-shot --side client \\
      --embeddings bundles/mine/class_embeddings.safetensors
  python -m serve.client photo.jpg --task detection \\
      --labels cat dog "traffic light" --threshold 0.25
  python -m serve.client *.jpg --encoded --partial \\
      --url gpu-server:8001 --ssl --ssl-root ca.pem

Writes DIR/TASK.npz (or .safetensors) with one row per picture, and PNG files:
features as principal components, classes as a map and as an overlay, depth
with a scale, the most likely classes as bars, objects as boxes (and as JSON,
in pixels). Pictures are brought to the model's size as the bundle says, or as
--view does; maps and boxes are those of the picture itself.

A folder stands for the pictures in and below it, without hidden ones. A
picture that cannot be read is listed (`bad`) and the others are answered.
Pictures of one name get numbers: cat_depth.png, cat_2_depth.png.

Exit status: 0 success; 1 no server, or it failed: what it answered is
written; 2 usage error, or no picture can be read; 3 some pictures could not
be read, the others are written.
"""


_SOME_BAD = 3
"""Exit status where some pictures were answered and others could not be read."""


def task_names() -> list[str]:
    return ["features", *(task.name for task in map_tasks()), "zero-shot", "detection"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    defaults, maps = ClientOptions(), ", ".join(task.name for task in map_tasks())
    result = CommandLine(
        prog="python -m serve.client",
        description=f"Request features, {maps}, zero-shot classes or boxes of pictures.",
        epilog=EPILOG,
    )
    result.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG or WebP files, or folders of them",
    )
    result.add_argument(
        "--task",
        default="features",
        choices=task_names(),
        metavar="TASK",
        help=f"{', '.join(task_names())} (default: features)",
    )
    result.add_argument(
        "--outputs", nargs="+", metavar="NAME", help="features: output names (default: all)"
    )
    result.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="zero-shot: classes (default: the bundle's); new ones need its text encoder; "
        "detection: what to look for",
    )
    result.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help="detection: score above which something counts as found (default: 0.25)",
    )
    result.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="zero-shot with --side client: file of export.text",
    )
    result.add_argument(
        "--side",
        default="server",
        choices=("server", "client"),
        help="where the task's head runs (default: server)",
    )
    result.add_argument(
        "--url",
        default=DEFAULT_URL,
        metavar="HOST:PORT",
        help=f"gRPC address (default: {DEFAULT_URL})",
    )
    result.add_argument(
        "--output",
        type=Path,
        default=Path("answers"),
        metavar="DIR",
        help="where to write (default: answers)",
    )
    result.add_argument(
        "--format",
        default="npz",
        choices=("npz", "safetensors"),
        help="file format of the saved arrays (default: npz)",
    )
    result.add_argument(
        "--encoded", action="store_true", help="send the files and let the server decode them"
    )
    result.add_argument(
        "--view",
        metavar="POLICY",
        help="how pictures are brought to the model's size: squash, centre-crop:SHARE, letterbox "
        "or, for maps, tiles:OVERLAP (default: the bundle's)",
    )
    result.add_argument(
        "--size",
        metavar="HxW",
        help="pixels, for models of dynamic resolution (default: the pictures' own if all have one "
        "that the model takes, else its largest)",
    )
    result.add_argument(
        "--partial", action="store_true", help="features: leave out heads that fail"
    )
    result.add_argument(
        "--shm",
        nargs="?",
        const="system",
        choices=("system", "cuda"),
        help="use shared memory (default kind: system)",
    )
    result.add_argument(
        "--admin-key",
        metavar="KEY",
        help="key of the server's restricted endpoints, which --shm uses",
    )
    result.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="S",
        help=f"seconds per request (default: {defaults.timeout:.0f})",
    )
    result.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="retries while the server is unavailable (default: 3)",
    )
    result.add_argument(
        "--request-id", metavar="ID", help="shown in the server's log (default: random)"
    )
    add_tls(result)
    return result


def _run(args: argparse.Namespace) -> int:
    images = expand(args.images)
    result, outputs = _answer(args, images)
    for path in result.wrote:
        print(f"wrote     {path}")
    if len(images) > 1:
        bad = f", {len(result.bad)} of the others cannot be read" if result.bad else ""
        print(f"answered  {result.answered} of {len(images)} pictures{bad}")
    if isinstance(result.failure, (Unavailable, NotAllowed)):
        raise with_remedy(result.failure, args.url)
    if result.failure:
        raise result.failure
    print(f"next      {_suggestion(args, outputs)}")
    return _SOME_BAD if result.bad else 0


def _answer(args: argparse.Namespace, images: list[Path]) -> tuple["Answered", Collection[str]]:
    """Ask and write; what came of it, and the outputs that the server offers."""
    _check(args)
    from serve.client import commands  # matplotlib takes a second to import

    command = commands.Command(
        images=images,
        task=args.task,
        output=args.output,
        format=args.format,
        options=_request_options(args),
        side=args.side,
        outputs=args.outputs,
        labels=args.labels,
        embeddings=args.embeddings,
        **({} if args.threshold is None else {"threshold": args.threshold}),
    )
    options = {
        "timeout": args.timeout,
        "retry": Retry(most=args.retries),
        "shared_memory": args.shm,
        "admin_key": args.admin_key,
        "tls": read_tls(args),
    }
    try:
        with FeatureClient(args.url, **options) as client:
            result = commands.answer(client, command)
            outputs = () if result.failure else client.describe().outputs
    except (Unavailable, NotAllowed) as error:
        raise with_remedy(error, args.url) from error
    return result, outputs


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that conflict."""
    for name, *tasks in (
        ("outputs", "features"),
        ("partial", "features"),
        ("labels", "zero-shot", "detection"),
        ("embeddings", "zero-shot"),
        ("threshold", "detection"),
    ):
        value = getattr(args, name)
        if value is not None and value is not False and args.task not in tasks:  # 0.0 == False
            raise UserError(
                f"--{name} is for --task {' or '.join(tasks)}: leave it out, or choose that task"
            )
    if args.task == "detection" and not args.labels:
        raise UserError("--task detection needs --labels: say what to look for")
    if args.task == "detection" and args.side == "client":
        raise UserError("--side client: --task detection runs on the server only, leave it out")
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


def _request_options(args: argparse.Namespace) -> RequestOptions:
    """How requests are made; raises UserError for an invalid size."""
    return RequestOptions(
        encoded=args.encoded,
        partial=args.partial,
        size=read_size(args.size),
        view=args.view,
        request_id=args.request_id,
    )


def _suggestion(args: argparse.Namespace, outputs: Collection[str]) -> str:
    """The next command to type: another task that the server has."""
    offered = ["features", *(task.name for task in map_tasks() if task.output in outputs)]
    tasks = [task for task in task_names() if task in (*offered, args.task)]
    place = tasks.index(args.task)
    url = f" --url {args.url}" if args.url != DEFAULT_URL else ""
    images, output = (
        " ".join(map(str, args.images)),
        "" if args.output == Path("answers") else f" --output {args.output}",
    )
    return f"python -m serve.client {images} --task {tasks[(place + 1) % len(tasks)]}{output}{url}"


if __name__ == "__main__":
    sys.exit(main())
