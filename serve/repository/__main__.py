"""`python -m serve.repository`: render and lint a Triton model repository from a bundle."""

import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import exit_status
from contract.signing import PublicKey, add_trust
from serve.repository.build import add_settings, check_output, make_repository, read_settings
from serve.repository.settings import Settings

EPILOG = """\
examples:
  python -m serve.repository bundles/mine --output repository
  python -m serve.repository bundles/mine --output repository \\
      --backend onnxruntime --kind gpu --devices 0 1
  python -m serve.repository bundles/mine --output repository \\
      --backend tensorrt --kind gpu --instances 2
  python -m serve.repository bundles/mine --output repository \\
      --runtime openvino --instances 2 --threads 1

--backend python runs in every Triton: the graphs run in onnxruntime or
OpenVINO inside Triton's python backend. onnxruntime and tensorrt are Triton's
native backends, which NVIDIA's container image has. Every file is checked
against the hashes in the bundle; --trust also wants the bundle to be signed.

Exit status: 0 success, 1 a failure, 2 a usage error, or files that cannot be
read or written.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m serve.repository",
        usage="python -m serve.repository BUNDLE --output DIR [options]",
        description="Render a Triton model repository from a bundle of export.run.",
        epilog=EPILOG,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="repository to create"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the repository at DIR, and only a repository that is not served",
    )
    add_trust(parser)
    add_settings(parser)
    args = parser.parse_args(arguments)
    return exit_status(
        lambda: _run(args.bundle, args.output, args.force, args.trust, read_settings(args))
    )


def _run(bundle: Path, output: Path, force: bool, trust: Sequence[Path], settings: Settings) -> int:
    from serve.bundle import read_bundle

    keys = [PublicKey(path) for path in trust]
    check_output(output, output.resolve(), force)
    names = make_repository(read_bundle(bundle, keys), output, settings, force=force)
    print(f"repository  {output}: {', '.join(names)}")
    if settings.backend == "python":
        print("next        serve it:")
        print(f"  python -m serve.run {bundle} --repository {output}")
    else:
        from serve.repository.native import native_flags

        print("next        serve it in NVIDIA's image:")
        gpus = "--gpus all " if settings.kind == "gpu" else ""
        print(
            f"  docker run {gpus}--rm --net host --shm-size 1g -v {output.absolute()}:/models "
            "nvcr.io/nvidia/tritonserver:26.06-py3 \\"
        )
        flags = ["--disable-auto-complete-config", *native_flags(output)]
        print(f"      tritonserver --model-repository /models {' '.join(flags)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
