"""`python -m distill.visualize`: pictures of a student's features (UMT Figures 1, 3 and 4)."""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.images import TRUSTED, UnreadableImage, decode
from distill.figures import cosine_map, pca_rgb, save_figure
from distill.methods.losses import Prediction
from distill.models.student import nearest_multiples
from distill.runs import load_run

EPILOG = """\
examples:
  python -m distill.visualize runs/quickstart photo.jpg
  python -m distill.visualize runs/quickstart photo.jpg --outputs backbone dino
  python -m distill.visualize runs/quickstart a.jpg b.jpg \\
      --sizes 224 448 896 --output pictures

Writes one PNG per image, with two rows per size: PCA of the features, and the
cosine of the image-level vector (a ViT's class token, a CNN's mean) to every
patch; a column for the backbone and for each teacher's head. A size may be any
multiple of the student's stride; memory grows with its square, or for a ViT's
attention with its fourth power.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.visualize",
        description="Picture the features of a trained student.",
        epilog=EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="photographs")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[224, 448],
        metavar="PIXELS",
        help="sides (default: 224 448)",
    )
    parser.add_argument(
        "--outputs", nargs="+", metavar="NAME", help="backbone and teacher labels (default: all)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: RUN/plots)"
    )
    args = parser.parse_args(arguments)
    return exit_status(
        lambda: visualize(args.run, args.images, args.sizes, args.outputs, args.output)
    )


def visualize(
    folder: Path,
    images: Sequence[Path],
    sizes: Sequence[int],
    outputs: Sequence[str] | None = None,
    target: Path | None = None,
) -> None:
    """Draw every image's features by the run in `folder` at every size.

    `outputs` default to all, `target` to RUN/plots. Raises UserError for a size the stride does not
    divide, an unknown output or an unreadable image.
    """
    run = load_run(folder)
    model = run.method.deploy()
    stride = model.student.stride
    for size in sizes:
        if size <= 0 or size % stride:
            raise UserError(
                f"--sizes {size} is not a multiple of the student's stride {stride}: use "
                f"{nearest_multiples(size, stride)}"
            )
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
