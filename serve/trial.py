"""`python -m serve.trial`: serve a bundle, request everything it offers once, write the answers as
pictures, stop.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.signing import PublicKey, add_trust
from contract.tasks import TASKS, map_tasks
from serve.repository.build import add_settings, make_repository, read_settings
from serve.repository.settings import Settings

EPILOG = """\
examples:
  python -m serve.trial bundles/mine photo.jpg --output answers

Starts a tritonserver on free ports of 127.0.0.1 and requests features and
every task the bundle has a head for. To keep a server running, use
`python -m serve.run`.

Exit status: 0 success, 1 the server failed, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    result = CommandLine(
        prog="python -m serve.trial",
        description="Serve a bundle just long enough to process one picture.",
        epilog=EPILOG,
    )
    result.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    result.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP file")
    result.add_argument(
        "--output",
        type=Path,
        default=Path("answers"),
        metavar="DIR",
        help="where to write (default: answers)",
    )
    result.add_argument(
        "--tritonserver", type=Path, metavar="FILE", help="executable (default: as serve.run)"
    )
    add_trust(result)
    add_settings(result.add_argument_group("models"))
    args = result.parse_args(arguments)
    return exit_status(
        lambda: _run(
            args.bundle, args.image, args.output, args.tritonserver, args.trust, read_settings(args)
        )
    )


def _run(
    bundle_folder: Path,
    image: Path,
    output: Path,
    executable: Path | None,
    trust: Sequence[Path],
    settings: Settings,
) -> int:
    from serve.bundle import read_bundle
    from serve.client import FeatureClient
    from serve.client.commands import Command, answer
    from serve.client.options import RequestOptions
    from serve.client.served import whole_view
    from serve.client.tasks.detection import EXAMPLES
    from serve.server.checks import check_backend, check_gpus
    from serve.server.golden import GoldenCheck
    from serve.server.launch import Options
    from serve.server.process import Server
    from serve.server.triton import find_tritonserver
    from serve.server.workspace import REPOSITORY, make_workspace

    if not image.is_file():
        raise UserError(f"{image}: no such file (name a JPEG, PNG or WebP picture)")
    with make_workspace(lambda line: None) as folder:
        repository = folder / REPOSITORY
        tritonserver = find_tritonserver(executable, folder)
        check_backend(tritonserver, settings.backend)
        bundle = read_bundle(bundle_folder, [PublicKey(path) for path in trust])
        check_gpus(settings, bundle)
        whole = whole_view({"view": bundle.manifest.view})
        models = make_repository(bundle, repository, settings, durable=False)
        options = Options(
            grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5, gpu=settings.kind == "gpu"
        )
        server = Server(tritonserver, repository, options, lambda line: None)
        server.check = GoldenCheck(repository, "warn", print)
        with server:
            print(f"serving   {len(models)} models of {bundle_folder} on {server.grpc}", flush=True)
            tasks = ["features", *(task.name for task in map_tasks() if task.name in models)]
            tasks += ["zero-shot"] if "zero_shot" in models else []
            tasks += ["detection"] if "detection" in models else []
            with FeatureClient(server.grpc) as client:
                for task in tasks:
                    labels = EXAMPLES if task == "detection" else None
                    options = RequestOptions(view=None if task in TASKS else whole)
                    command = Command([image], task, output, options=options, labels=labels)
                    for path in answer(client, command).wrote:
                        print(f"wrote     {path}", flush=True)
    print("next      keep it running, and send requests from another terminal:")
    print(f"  python -m serve.run {bundle_folder}")
    view = f" --view {whole}" if whole else ""
    print(f"  python -m serve.client {image} --task features{view}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
