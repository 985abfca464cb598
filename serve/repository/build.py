"""Rendering a model repository: settings, models, lint, files, and the rename that puts it in
place.
"""

import argparse
import contextlib
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from contract.claim import claimed
from contract.errors import UserError
from contract.files import check_place, new_folder, tidy
from serve.repository.contents import CONFIG, MadeWith, destination, foreign_file, is_filled
from serve.repository.live import refuse_served
from serve.repository.settings import Settings

if TYPE_CHECKING:
    from serve.bundle import Bundle
    from serve.repository.models import Model


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options of serve.repository, serve.run and serve.trial."""
    known = Settings.model_fields
    parser.add_argument(
        "--backend",
        default="python",
        choices=("python", "onnxruntime", "tensorrt"),
        help="runtime of Triton (default: python)",
    )
    parser.add_argument(
        "--runtime",
        default="auto",
        choices=("auto", "onnxruntime", "openvino", "tensorrt"),
        help="of the python backend; auto (default): OpenVINO on CPUs if installed, else "
        "onnxruntime",
    )
    parser.add_argument(
        "--kind", default="cpu", choices=("cpu", "gpu"), help="where graphs run (default: cpu)"
    )
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[0], metavar="N", help="GPU indices (default: 0)"
    )
    parser.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="copies of each large graph (default: on CPUs 2 for every 8 cores or part of them, 1 "
        "on a single core; on GPUs 1)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of each instance; on GPUs of the text encoder alone (default: cores, at "
        "most 8)",
    )
    parser.add_argument(
        "--decoders",
        type=int,
        metavar="N",
        help="processes that decode pictures (default: cores, at most 8)",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="largest batch (default: of the bundle)"
    )
    parser.add_argument(
        "--queue-delay",
        type=int,
        metavar="US",
        help="microseconds a request waits for a batch (default: 0 for features as one model, "
        "500 otherwise)",
    )
    default = known["max_queue"].default
    parser.add_argument(
        "--max-queue",
        type=int,
        default=default,
        metavar="N",
        help=f"waiting requests, at most (default: {default})",
    )
    parser.add_argument(
        "--no-batching",
        action="store_true",
        help="one request at a time, and any number waiting",
    )
    parser.add_argument(
        "--no-warmup", action="store_true", help="report ready before the graphs have run once"
    )
    parser.add_argument(
        "--no-fused", action="store_true", help="leave out the graph of all outputs to save memory"
    )
    parser.add_argument(
        "--no-nan-check",
        action="store_true",
        help="native backends: pass on NaN and infinity, one copy less",
    )
    for name, what in (
        ("max_image_bytes", "of an encoded picture"),
        ("max_image_pixels", "of a picture"),
    ):
        option, default = "--" + name.replace("_", "-"), known[name].default
        parser.add_argument(
            option,
            type=int,
            default=default,
            metavar="N",
            help=f"{what}, at most (default: {default:,})",
        )
    parser.add_argument(
        "--parts",
        default="auto",
        choices=("auto", "together", "apart"),
        help="graphs of a student: in one model, or a model for each and an ensemble; auto "
        "(default): together in the python backend on CPUs",
    )
    parser.add_argument(
        "--response-cache",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="models whose answers are cached (default: none)",
    )


def read_settings(args: argparse.Namespace) -> Settings:
    """Settings of a parsed command line; raises UserError for invalid values."""
    from serve.repository.settings import MOST_THREADS, choose_runtime, cores, instances_and_threads

    for name in (
        "instances",
        "threads",
        "decoders",
        "max_batch",
        "max_queue",
        "max_image_bytes",
        "max_image_pixels",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if args.parts == "together" and (args.backend != "python" or args.kind != "cpu"):
        raise UserError(
            "--parts together is for --backend python on CPUs: leave it out, or choose apart"
        )
    if args.queue_delay is not None and args.queue_delay < 0:
        raise UserError(f"--queue-delay {args.queue_delay}: give 0 or more microseconds")
    if args.backend == "tensorrt" and args.kind != "gpu":
        raise UserError("--backend tensorrt runs on GPUs: add --kind gpu")
    # on GPUs the threads are the text encoder's, which runs on the CPU
    instances = args.instances or (1 if args.kind == "gpu" else None)
    instances, threads = instances_and_threads(instances, args.threads, cores())
    return Settings(
        backend=args.backend,
        runtime=choose_runtime(args.runtime, args.kind),
        kind=args.kind,
        devices=tuple(args.devices),
        instances=instances,
        threads=threads,
        decoders=args.decoders or min(cores(), MOST_THREADS),
        max_batch=args.max_batch,
        queue_delay_us=args.queue_delay,
        max_queue=args.max_queue,
        batching=not args.no_batching,
        warmup=not args.no_warmup,
        fused=not args.no_fused,
        nan_check=not args.no_nan_check,
        max_image_bytes=args.max_image_bytes,
        max_image_pixels=args.max_image_pixels,
        response_cache=tuple(args.response_cache),
        parts=args.parts,
    )


def make_repository(
    bundle: "Bundle",
    output: Path,
    settings: Settings,
    durable: bool = True,
    force: bool = False,
) -> list[str]:
    """Render, lint and write a repository to a temporary folder, then rename it into place.

    `durable`: flush it to disk before the rename. Returns the models' names. Raises UserError
    for an `output` that holds anything, with `force` anything but a repository, and for one that is
    served.
    """
    from serve.repository.lint import lint
    from serve.repository.models import build_models

    models = build_models(bundle, settings)
    wrong = lint({model.name: model.config for model in models})
    if wrong:
        raise UserError(
            f"{bundle.path} makes a repository that Triton would not serve correctly: "
            f"{'; '.join(wrong)}"
        )
    place = output.resolve()
    tidy(place, lambda old: not foreign_file(old))
    replaceable = partial(check_output, output, place, force)
    # a server that starts meanwhile waits outside
    remedy = "stop it first, or choose another --output"
    held = contextlib.nullcontext()
    if is_filled(place):
        held = claimed(place, "serve.repository", remedy)
    with held, new_folder(place, f"--output {output}", replaceable, durable) as aside:
        for model in models:
            write_model(aside / model.name, model, settings.version)
        names = tuple(model.name for model in models)
        MadeWith(
            bundle=bundle.version, settings=settings, models=names, signed_by=bundle.signed_by
        ).write(aside)
    return [model.name for model in models]


def check_output(output: Path, place: Path, force: bool) -> None:
    """Raise UserError for a file, a folder that may not be replaced, one that is served, one that
    holds anything but a repository, and without `force` one that holds anything.
    """
    check_place(place, f"--output {output}")
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    refuse_served(place, f"--output {output}", "stop it first, or choose another")
    if not force and any(place.iterdir()):
        raise UserError(
            f"--output {output} is already there: add --force to replace it, or choose another"
        )
    if result := foreign_file(place):
        raise UserError(
            f"--output {output} holds {result}, which is not part of a repository: move it away, "
            "or choose another"
        )


def write_model(folder: Path, model: "Model", version: int) -> None:
    """Write config.pbtxt and the files of one version."""
    write_version(folder / str(version), model)
    (folder / CONFIG).write_text(_config_text(model), encoding="utf-8")


def write_version(folder: Path, model: "Model") -> None:
    """Write the files of one version into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        target = destination(folder, name)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            content.copy(target)
    # a rollout goes back and forth between its versions' configurations
    if model.pinned:
        (folder / CONFIG).write_text(_config_text(model), encoding="utf-8")


def _config_text(model: "Model") -> str:
    from google.protobuf import text_format

    source = "rendered by serve.repository; triton_models/ of the project explains the fields"
    return f"# {source}\n{text_format.MessageToString(model.config)}"
