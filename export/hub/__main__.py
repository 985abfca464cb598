"""`python -m export.hub`: a run as a folder that timm and transformers load, and its upload."""

import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.views import ViewPolicy
from export.output import check_output

EPILOG = """\
examples:
  python -m export.hub runs/quickstart --output hub/quickstart
  python -m export.hub runs/mine --output hub/mine --push me/mine --private

One folder for three loaders:
  timm.create_model("local-dir:FOLDER", pretrained=True)
  transformers.AutoModel.from_pretrained(FOLDER)
  transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
The first two give the backbone, the third the heads of all teachers too.
AutoImageProcessor and pipeline("image-feature-extraction") read it as well.

Each loader is run in a process without this package, and what it gives for
photographs is compared with the student: a folder that differs is not
written. README.md, the model card, says which call gives what.

A student of KPU with its adapter is for the third loader alone. Heads of
tasks in RUN/heads are left out.

--push needs HF_TOKEN, or a login by `hf auth login`. A folder that could not
be uploaded stays.

Exit status: 0 success, 1 a loader disagrees or another failure, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.hub",
        description="Write a trained student and its heads for timm, transformers and the hub.",
        epilog=EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder to create"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it as this model of the Hugging Face hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: a new repository is private"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="photographs to compare on and to draw (default: packaged ones)",
    )
    parser.add_argument(
        "--view",
        metavar="POLICY",
        help="what the image processor shows of pictures: squash, centre-crop:SHARE or letterbox, "
        "then ,bilinear (default: that of the run's recipe)",
    )
    parser.add_argument(
        "--licence",
        metavar="ID",
        help="licence of the student in its card, such as apache-2.0 (default: the teachers', "
        "where all have the same and none is restricted; else `other`)",
    )
    args = parser.parse_args(arguments)
    return exit_status(
        lambda: _run(
            args.run, args.output, args.push, args.private, args.images, args.licence, args.view
        )
    )


def _run(
    run: Path,
    output: Path,
    name: str | None,
    private: bool,
    images: Path | None,
    licence: str | None,
    view: str | None,
) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("export.hub needs transformers: pip install 'vfm-distill[hf]'")
    if private and not name:
        raise UserError("--private is for --push: add it, or leave --private out")
    if name:
        from export.hub.push import check_push

        check_push(name)
    read = {"RUN": run} | ({"--images": images} if images else {})
    try:
        view = view and str(ViewPolicy.parse(view))
    except ValueError as error:
        raise UserError(f"--view: {error}") from error
    place = check_output(output, False, read)
    logging.getLogger("timm").setLevel(logging.ERROR)

    # torch, timm and transformers take seconds to load
    from export.hub.assemble import assemble

    rows = assemble(run, place, images, licence, view)
    print(f"{'compared':34}difference / largest value")
    for row in rows:
        print(f"{row.name:34}{row.difference:.2g}")
    print(f"folder    {output}")
    print(f"card      {output / 'README.md'}")
    if not name:
        print("next      read the card, then upload it:")
        print(f"  hf upload OWNER/NAME {shlex.quote(str(output))}")
        return
    from export.hub.push import push

    print(f"pushed    {push(place, name, private)}")


if __name__ == "__main__":
    sys.exit(main())
