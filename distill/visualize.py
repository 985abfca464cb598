"""`python -m distill.visualize`: pictures of a student's features (UMT Figures 1, 3 and 4), of its
attention (SeFA Figures 3 to 7) and of its feature space (SeFA Figure 2).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from contract.command_line import CommandLine, whole_number
from contract.errors import UserError, exit_status
from contract.images import TRUSTED, UnreadableImage, decode
from distill.figures import cosine_map, pca_rgb, save_figure
from distill.methods.losses import Prediction
from distill.models.layout import nearest_multiples
from distill.runs import Checkpoint, load_run, parse_checkpoint

EPILOG = """\
examples:
  python -m distill.visualize runs/quickstart photo.jpg
  python -m distill.visualize runs/quickstart photo.jpg --outputs backbone dino
  python -m distill.visualize runs/quickstart a.jpg b.jpg \\
      --sizes 224 448 896 --output pictures
  python -m distill.visualize runs/mine photo.jpg --kind attention \\
      --with-teachers --sizes 480
  python -m distill.visualize runs/mine --kind tsne --with-teachers \\
      --data /data/imagenet --points 20000

features: one PNG per image, with two rows per size: PCA of the features, and
the cosine of the image-level vector (a ViT's class token, a CNN's mean) to
every patch; a column for the backbone and for each teacher's head.
attention: one PNG per image, a row per network (and size): the picture, its
last block's tokens in clusters, and how much the class token attends to each
patch, a map per head. ViTs only.
tsne: one PNG, a panel per network: the validation split of DATA (any layout of
distill.evaluate --list), or a folder of CLASS/*.jpg or of pictures alone,
coloured by class.
A size may be any multiple of the student's stride; memory grows with its
square, or for a ViT's attention with its fourth power.
"""

_KINDS = ("features", "attention", "tsne")
_PERPLEXITY = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.visualize",
        description="Picture the features of a trained student.",
        epilog=EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="photographs")
    parser.add_argument(
        "--kind", choices=_KINDS, default="features", help="what to draw (default: features)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="sides (default: 224 448; of attention each network's own)",
    )
    parser.add_argument(
        "--outputs",
        nargs="+",
        metavar="NAME",
        help="features: backbone and teacher labels (default: all)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|STEP",
        help="which of the run's weights: latest (newest checkpoint), a step, or best (by its "
        "monitor); default: those of the finished run",
    )
    parser.add_argument(
        "--with-teachers",
        action="store_true",
        help="attention, tsne: also the run's teachers",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and run the code of the run's teachers (python:, trust_remote_code)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="tsne: pictures, best with classes"
    )
    parser.add_argument(
        "--points", type=int, metavar="N", help="tsne: pictures to draw (default: 2000)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),  # scikit-learn's
        default=0,
        metavar="N",
        help="attention, tsne: of clusters, and of which pictures (default: 0)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: RUN/plots)"
    )
    args = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _draw_kind(args))


_MISPLACED = {
    "features": (("--with-teachers", "with_teachers"), ("--data", "data"), ("--points", "points")),
    "attention": (("--outputs", "outputs"), ("--data", "data"), ("--points", "points")),
    "tsne": (("IMAGE", "images"), ("--sizes", "sizes"), ("--outputs", "outputs")),
}
"""Arguments that a kind does not take."""


def _draw_kind(args) -> None:
    """Draw what the command line asks for; raises UserError."""
    for name, key in _MISPLACED[args.kind]:
        if getattr(args, key):
            kinds = [kind for kind in _KINDS if (name, key) not in _MISPLACED[kind]]
            raise UserError(f"{name} goes with --kind {' or '.join(kinds)}, not {args.kind}")
    checkpoint = parse_checkpoint(args.checkpoint)
    if args.kind == "tsne":
        points = 2000 if args.points is None else args.points
        visualize_space(
            args.run,
            args.data,
            points,
            args.with_teachers,
            args.output,
            seed=args.seed,
            checkpoint=checkpoint,
            trust_code=args.trust_code,
        )
        return
    if not args.images:
        raise UserError(f"--kind {args.kind} draws photographs: name at least one IMAGE")
    if args.kind == "attention":
        visualize_attention(
            args.run,
            args.images,
            args.sizes,
            args.with_teachers,
            args.output,
            seed=args.seed,
            checkpoint=checkpoint,
            trust_code=args.trust_code,
        )
    else:
        sizes = args.sizes or [224, 448]
        visualize(args.run, args.images, sizes, args.outputs, args.output, checkpoint)


def visualize(
    folder: Path,
    images: Sequence[Path],
    sizes: Sequence[int],
    outputs: Sequence[str] | None = None,
    target: Path | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Draw every image's features by the run in `folder` at every size.

    `outputs` default to all, `target` to RUN/plots. Raises UserError for a size the stride does not
    divide, an unknown output or an unreadable image.
    """
    run = load_run(folder, checkpoint=checkpoint)
    if not run.finished:
        print(f"weights   {run.weights}")
    model = run.method.deploy()
    _check_sizes(sizes, model.student.stride)
    known = ["backbone", *model.heads]
    for name in outputs or []:
        if name not in known:
            raise UserError(f"--outputs {name}: choose from {', '.join(known)}")
    outputs = outputs or known
    photos = [_read_image(path) for path in images]
    target = target or folder / "plots"
    for path, photo in zip(images, photos, strict=True):
        pixels, predictions = [], []
        for size in sizes:
            square = _square_pixels(photo, size)
            pixels.append(square)
            with torch.inference_mode():
                result = model(torch.from_numpy(square).permute(2, 0, 1).unsqueeze(0).float() / 255)
            predictions.append({name: result[name] for name in outputs})
        picture = _draw(target / f"{path.stem}_features.png", pixels, predictions)
        print(f"features  {picture}")


def visualize_attention(
    folder: Path,
    images: Sequence[Path],
    sizes: Sequence[int] | None = None,
    with_teachers: bool = False,
    target: Path | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    trust_code: bool = False,
) -> None:
    """Draw the attention of the last block, a row for the student and for each teacher that is a
    ViT, at every size (default: each network's own).

    Teachers without such attention are named and left out. Raises UserError for a student without,
    a size that its stride does not divide or a teacher cannot take, and an unreadable image.
    """
    from distill.evaluate.attention import attention_figure, attention_rows, has_attention

    target = target or folder / "plots"
    networks = _networks(folder, with_teachers, target, checkpoint, trust_code)
    student = next(iter(networks.values()))
    _check_sizes(sizes or [], student.stride)
    photos = [_read_image(path) for path in images]
    for name, encoder in list(networks.items()):
        if encoder is not student and not has_attention(encoder):
            print(f"note      {name} is left out: it is no plain ViT, which has attention to draw")
            del networks[name]
    for path, photo in zip(images, photos, strict=True):
        rows = []
        for name, encoder in networks.items():
            for size in sizes or [encoder.image_size]:
                side = encoder.fit(size)
                rows += attention_rows(encoder, [photo], f"{name}, {side} px", seed, side)
        print(f"attention {attention_figure(target / f'{path.stem}_attention.png', rows)}")


def visualize_space(
    folder: Path,
    data: Path | None,
    points: int = 2000,
    with_teachers: bool = False,
    target: Path | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    trust_code: bool = False,
) -> None:
    """Draw the t-SNE of the summaries of at most `points` pictures, a panel for the student and for
    each teacher.

    Raises UserError without data, for fewer than four points, a folder without pictures, and a
    teacher without image-level vectors.
    """
    from distill.evaluate.config import ExtractConfig
    from distill.evaluate.datasets import Some
    from distill.evaluate.extract import PolicyViews, extract
    from distill.evaluate.representation import tsne_figure

    if data is None:
        raise UserError("--kind tsne needs pictures: add --data ROOT")
    if points < 4:
        raise UserError(f"--points {points} is too few for t-SNE: use 4 or more")
    split = _open_pictures(data)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    some = Some(split, tuple(sorted(order[:points].tolist())))
    if len(some) < 4:
        raise UserError(f"--data {data} has {len(some)} pictures: t-SNE needs 4 or more")
    target = target or folder / "plots"
    networks = _networks(folder, with_teachers, target, checkpoint, trust_code)
    for encoder in networks.values():
        encoder.need_summary("t-SNE")
    config, features = ExtractConfig(), {}
    for name, encoder in networks.items():
        views = PolicyViews(some, encoder.image_size, encoder.view_of(config))
        found = extract(encoder, views, target / "cache", config, what=f"t-SNE, {name}")
        features[name] = found.summaries().numpy()
    path = target / "tsne.png"
    tsne_figure(path, features, some.labels, some.classes, _PERPLEXITY, seed)
    print(f"t-SNE     {path}")


def _check_sizes(sizes: Sequence[int], stride: int) -> None:
    """Raise UserError for a size that the student's stride does not divide."""
    for size in sizes:
        if size <= 0 or size % stride:
            raise UserError(
                f"--sizes {size} is not a multiple of the student's stride {stride}: use "
                f"{nearest_multiples(size, stride)}"
            )


def _networks(
    folder: Path,
    with_teachers: bool,
    target: Path,
    checkpoint: Checkpoint | None,
    trust_code: bool,
) -> dict:
    """Encoders by the name to draw: the student, then the teachers."""
    from distill.evaluate.cast import open_rows
    from distill.methods.deployment import BACKBONE

    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder (give one made by distill.run)")
    rows = open_rows(
        str(folder),
        [BACKBONE],
        with_teachers,
        None,
        "auto",
        target,
        checkpoint=checkpoint,
        trust_code=trust_code,
    )
    names = ["student", *(row.name.partition(" (")[0] for row in rows[1:])]
    return dict(zip(names, (row.encoder for row in rows), strict=True))


def _open_pictures(data: Path):
    """The validation split below `data`, or the pictures of a folder that has none."""
    from distill.evaluate.archives import archive_of, open_labelled
    from distill.evaluate.datasets import family_root, open_folder, split_folder

    root = family_root(data, "classification")
    if archive_of(root) is not None or split_folder(root, "val") is not None:
        return open_labelled(data, "val")
    return open_folder(root)


def _read_image(path: Path) -> Image.Image:
    """Decode a photograph; raises UserError."""
    if not path.is_file():
        raise UserError(f"image {path}: no such file")
    try:
        return decode(path, TRUSTED, name=str(path))
    except UnreadableImage as error:
        raise UserError(f"image {path} cannot be read: {error.reason}") from error


def _square_pixels(photo: Image.Image, size: int) -> np.ndarray:
    """The largest centred square of a photograph as uint8 [size, size, 3]."""
    short = min(photo.size)
    left, top = (photo.width - short) / 2, (photo.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.array(photo.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _draw(path: Path, pixels: list[np.ndarray], predictions: list[dict[str, Prediction]]) -> Path:
    """Write one figure: for every size a row of PCA pictures and a row of cosine maps, a column an
    output.
    """
    names = list(predictions[0])
    figure, axes = plt.subplots(
        2 * len(pixels),
        1 + len(names),
        figsize=(2.6 * (1 + len(names)), 5.4 * len(pixels)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (photo, result) in enumerate(zip(pixels, predictions, strict=True)):
        top, bottom = axes[2 * row], axes[2 * row + 1]
        top[0].imshow(photo)
        top[0].set_title(f"{photo.shape[0]} px")
        bottom[0].text(
            0.5, 0.5, "cosine of the\nimage-level vector\nto each patch", ha="center", va="center"
        )
        for column, name in enumerate(names, start=1):
            prediction = result[name]
            (colours,) = pca_rgb([prediction.patches[0]])
            top[column].imshow(colours, interpolation="nearest")
            grid = "x".join(str(side) for side in prediction.patches.shape[1:3])
            top[column].set_title(f"{name}, {grid}")
            if prediction.summary is None:
                bottom[column].text(0.5, 0.5, "no image-level vector", ha="center", va="center")
                continue
            cosine = cosine_map(prediction.summary[0], prediction.patches[0])
            bottom[column].imshow(cosine, interpolation="nearest", cmap="viridis")
            bottom[column].set_title(f"{cosine.min():.2f} … {cosine.max():.2f}", fontsize=9)
    return save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
