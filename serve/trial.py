"""`python -m serve.trial`: start a bundle, ask it once for everything it offers, keep the answers
as pictures, stop it.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.tasks import map_tasks
from serve.repository.build import add_settings, make_repository, read_settings

EPILOG = """\
examples:
  python -m serve.trial bundles/mine photo.jpg --output answers

A real tritonserver on free ports of 127.0.0.1, asked through serve.client for features and for each task the bundle has a
head for. To go on asking, start it with python -m serve.run. Exit status: 0 all answered, 2 a mistake in what was asked,
1 the server failed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    result = CommandLine(
        prog="python -m serve.trial",
        description="Serve a bundle for the time of one picture.",
        epilog=EPILOG,
    )
    result.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    result.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("answers"),
        metavar="DIR",
        help="where to write (answers)",
    )
    result.add_argument("--tritonserver", type=Path, metavar="FILE", help="(as serve.run finds it)")
    add_settings(result.add_argument_group("models"))
    args = result.parse_args(arguments)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    from serve.bundle import read_bundle
    from serve.client import FeatureClient
    from serve.client.commands import Command, answer
    from serve.server.checks import check_backend, check_gpus
    from serve.server.launch import Options
    from serve.server.process import Server
    from serve.server.triton import find_tritonserver

    if not args.image.is_file():
        raise UserError(f"{args.image}: no such file (name a JPEG, PNG or WebP picture)")
    settings = read_settings(args)
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        repository = Path(folder) / "repository"
        tritonserver = find_tritonserver(args.tritonserver, Path(folder))
        check_backend(tritonserver, settings.backend)
        bundle = read_bundle(args.bundle)
        check_gpus(settings, bundle)
        models = make_repository(bundle, repository, settings, durable=False)
        options = Options(
            grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5, gpu=settings.kind == "gpu"
        )
        with Server(tritonserver, repository, options, lambda line: None) as server:
            print(f"serving   {len(models)} models of {args.bundle} on {server.grpc}", flush=True)
            tasks = ["features", *(task.name for task in map_tasks() if task.name in models)]
            tasks += ["zero-shot"] if "zero_shot" in models else []
            with FeatureClient(server.grpc) as client:
                for task in tasks:
                    for path in answer(client, Command([args.image], task, args.output)):
                        print(f"wrote     {path}", flush=True)
    print("next      serve it for as long as you like, and ask it from another terminal:")
    print(f"  python -m serve.run {args.bundle}")
    print(f"  python -m serve.client {args.image} --task features")
    return 0


if __name__ == "__main__":
    sys.exit(main())
