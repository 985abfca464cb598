"""A detector distilled from features alone, from drawn scenes to boxes, on a CPU
without network.

    python benchmarks/tiny_detector.py --output runs/tiny_detector

1. Draws scenes of one to three solids in plain colours, with boxes
   (`distill.scenes`).
2. Trains a GroundingDINO of about a million parameters on them: its backbone
   first, to name what each position shows, then the whole by the detector's
   own loss.
3. Distils its image backbone into a ViT-Adapter around a small frozen ViT
   (method kpu). No label and no part of the detector behind its backbone takes
   part.
4. Lets the detector find the shapes by their names in other scenes, in its own
   maps and in those that the student predicts, untrained and distilled.

The margin was set before anything was measured: the distilled student's AP50
has to exceed the untrained one's by MARGIN. Writes detection.json,
detection.md and detection.png. What already exists is not computed again:
other options need another --output.
"""

import argparse
import copy
import datetime
import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from contract.detection import Detections, TextInputs, read_tokenizer, text_inputs
from contract.files import new_folder
from distill.distributed import join_ranks
from distill.evaluate.boxes import BoxedPictures, open_boxes
from distill.evaluate.cast import open_rows
from distill.evaluate.detection import Detector, average_precision
from distill.evaluate.encoder import Encoder
from distill.evaluate.pictures import draw_box
from distill.models.packaged import packaged_checkpoint
from distill.models.preprocess import Preprocess
from distill.recipe_io import make_recipe
from distill.runs import git_commit
from distill.scenes import CLASSES, MASK_NAMES, write
from distill.teachers.grounding_dino import MEAN, STD
from distill.tiny import detector_vocabulary
from distill.training.loop import train
from distill.training.stop import StopSignal

MARGIN = 0.2
"""By which the distilled student's AP50 has to exceed the untrained one's."""

SIZE = 80
"""Side of the scenes, in pixels."""

_ROWS = ("teacher", "untrained", "distilled")
_SCORES = ("AP", "AP50", "AP75")
_TOP = 100
"""Boxes that count in a picture."""
_SHOWN = 0.3
"""Lowest score of the boxes that are drawn."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the four steps, as far as their results do not exist yet."""
    args = _parser().parse_args(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)
    scenes, detector = args.output / "scenes", args.output / "detector"
    if not scenes.exists():
        write(scenes, args.train, args.val, SIZE, args.seed, plain=True)
    if not detector.exists():
        with new_folder(detector, f"--output {detector}") as aside:
            train_detector(
                scenes, aside, args.backbone_steps, args.detector_steps, args.batch, args.seed
            )
    for name, steps in {"untrained": 0, "distilled": args.steps}.items():
        if not (args.output / name / "student.safetensors").exists():
            shutil.rmtree(args.output / name, ignore_errors=True)  # of a run that was killed
            distil(scenes, detector, args.output / name, steps, args.seed)
    _sum_up(args, scenes, detector)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--output",
        type=Path,
        default=Path("runs/tiny_detector"),
        metavar="DIR",
        help="(runs/tiny_detector)",
    )
    numbers = {
        "train": (1500, "scenes to learn from"),
        "val": (200, "scenes held out"),
        "backbone-steps": (350, "optimizer steps of the detector's backbone alone"),
        "detector-steps": (650, "optimizer steps of the detector"),
        "steps": (400, "optimizer steps of the student"),
        "batch": (8, "pictures in a step of the detector"),
        "seed": (0, "of scenes, weights and orders"),
    }
    for name, (default, does) in numbers.items():
        made.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{does} ({default})"
        )
    return made


# ---- the detector -------------------------------------------------------------------------------


def new_detector(vocabulary: int) -> nn.Module:
    """A GroundingDINO with random weights and a Swin Transformer for scenes of SIZE pixels."""
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        SwinConfig,
    )

    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                embed_dim=24,
                depths=[1, 1, 2, 1],
                num_heads=[1, 2, 4, 8],
                window_size=5,
                drop_path_rate=0.0,
                out_indices=[2, 3, 4],
            ),
            text_config=BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            d_model=64,
            num_queries=20,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            dropout=0.0,
            fusion_droppath=0.0,
            auxiliary_loss=True,
            disable_custom_kernels=True,
        )
    )
    # Logits are products of normalised vectors: as they come, they are large and its first hundreds
    # of steps would only make them small. So they start small, and "no object" as a focal loss
    # likes it: the biases add -0.25 * 0.25 * 64 = -4, a probability of 0.02.
    core = model.model
    text = core.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    nn.init.constant_(text.weight, 0.2)
    nn.init.constant_(text.bias, 0.25)
    for norm in (core.enc_output_norm, core.decoder.layer_norm):
        nn.init.constant_(norm.bias, -0.25)
    return model


def train_detector(
    scenes: Path, folder: Path, first: int, steps: int, batch: int, seed: int
) -> None:
    """Train a detector on scenes, also mirrored, after `first` steps of its backbone alone, and
    write it as transformers does, with its vocabulary.
    """
    pictures = open_boxes(scenes, "instances_train2017.json")
    torch.manual_seed(seed)
    vocabulary = detector_vocabulary(pictures.classes)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokens = text_inputs(pictures.classes, read_tokenizer(folder / "vocab.txt"))
    images = torch.stack(
        [
            torch.from_numpy(np.array(pictures.picture(number))).permute(2, 0, 1)
            for number in range(len(pictures))
        ]
    )
    masks = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(scenes / "dense" / "train" / "masks" / file.name)))
            for file in pictures.files
        ]
    )
    preprocess = Preprocess(SIZE, MEAN, STD)
    model = new_detector(len(vocabulary)).train()
    backbone = model.model.backbone.conv_encoder.model
    pretrain(backbone, images, masks, first)
    known = set(backbone.parameters())
    rest = [parameter for parameter in model.parameters() if parameter not in known]
    groups = [{"params": [*known], "lr": 3e-4}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(1, steps + 1):
        numbers = torch.randint(len(pictures), (batch,)).tolist()
        flips = torch.rand(batch) < 0.5
        pixels = preprocess(images[numbers])
        pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
        targets = [
            _target(pictures, number, flip)
            for number, flip in zip(numbers, flips.tolist(), strict=True)
        ]
        loss = _loss(model, pixels, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"detector  step {step}: loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)


def pretrain(backbone: nn.Module, images: Tensor, masks: Tensor, steps: int) -> None:
    """Let a linear layer on each of the backbone's maps name what its positions show, of images
    uint8 [N, 3, S, S] with masks uint8 [N, S, S]; also mirrored, 32 a step.
    """
    preprocess = Preprocess(SIZE, MEAN, STD)
    with torch.no_grad():
        widths = [level.shape[1] for level in backbone(preprocess(images[:1])).feature_maps]
    heads = nn.ModuleList(nn.Conv2d(width, len(MASK_NAMES), 1) for width in widths)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    # as solids are smaller than wall and floor
    weight = torch.tensor([0.2, 0.2] + [1.0] * len(CLASSES))
    backbone.train()
    for step in range(1, steps + 1):
        numbers = torch.randint(len(images), (32,))
        pixels, truth = preprocess(images[numbers]), masks[numbers].long()
        if step % 2:
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        loss = 0.0
        for head, level in zip(heads, backbone(pixels).feature_maps, strict=True):
            place = (torch.arange(level.shape[-1]) + 0.5) * (SIZE / level.shape[-1])
            there = truth[:, place.long()][:, :, place.long()]
            loss = loss + F.cross_entropy(head(level), there, weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"backbone  step {step}: loss {loss.item() / 3:.3f}", flush=True)


def _loss(model: nn.Module, pixels: Tensor, tokens: TextInputs, targets: list) -> Tensor:
    """transformers' loss of every layer of the decoder and, with the same weights, of the boxes
    that the encoder proposes.

    transformers' own loss of the proposals is left out: it reads their boxes without gradient and,
    in place of their features, the queries' first embeddings, so nothing would learn to propose.
    """
    ids = torch.from_numpy(tokens.ids).expand(len(pixels), -1)
    output = model(pixel_values=pixels, input_ids=ids, labels=targets)
    weights = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}
    losses = [
        weights[name.split("_")[1]] * value
        for name, value in output.loss_dict.items()
        if name.startswith("loss_") and not name.endswith("_enc")
    ]
    scores, boxes = output.enc_outputs_class, output.enc_outputs_coord_logits.sigmoid()
    label_map = torch.zeros(len(tokens.label_map), scores.shape[-1])
    label_map[:, : ids.shape[1]] = torch.from_numpy(tokens.label_map > 0).float()
    words = torch.arange(scores.shape[-1]).expand_as(scores) < ids.shape[1]
    one = copy.copy(model.config)
    one.two_stage = one.auxiliary_loss = False
    maps = (label_map,) * len(pixels)
    return (
        sum(losses)
        + model.loss_function(scores, targets, scores.device, boxes, one, maps, words)[0]
    )


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: 100 steps up, then half a cosine down to a twentieth."""
    return min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def _target(pictures: BoxedPictures, number: int, flip: bool) -> dict[str, Tensor]:
    """Labels of a picture, mirrored or not, as transformers takes them."""
    boxes = pictures.boxes[number]
    edges = torch.from_numpy(boxes.edges / np.array(pictures.sizes[number] * 2)).float()
    first, last = edges[:, :2], edges[:, 2:]
    centres = (first + last) / 2
    if flip:
        centres[:, 0] = 1 - centres[:, 0]
    return {
        "class_labels": torch.from_numpy(boxes.labels),
        "boxes": torch.cat([centres, last - first], 1),
    }


# ---- the student --------------------------------------------------------------------------------


def distil(scenes: Path, detector: Path, run: Path, steps: int, seed: int) -> None:
    """Train a student on the detector's maps of scenes; with 0 steps it stays as it starts."""
    pictures = scenes / "detection" / "train2017"
    optimizer = {"steps": steps, "lr": 2e-3, "min_lr": 1e-5, "warmup_steps": steps // 10}
    if not steps:  # a run has a step
        optimizer = {"steps": 1, "lr": 1e-12, "min_lr": 0, "warmup_steps": 0}
    recipe = make_recipe(
        {
            "method": "kpu",
            "student": {
                "name": "vit_tiny_patch16_224",
                "image_size": SIZE,
                "kwargs": {"embed_dim": 128, "depth": 6, "num_heads": 4},
                "checkpoint": str(packaged_checkpoint("photo-mae")),
            },
            "teachers": [
                {
                    "name": "grounding_dino",
                    "alias": "detector",
                    "role": "detector",
                    "checkpoint": str(detector),
                    "image_size": SIZE,
                }
            ],
            "kpu": {"adapter": {"blocks": 2, "heads": 4, "width": 32, "extra": 0}},
            "data": {
                "kind": "folder",
                "path": str(pictures),
                "workers": 0,
                "repeats": max(1, math.ceil(16 / len(list(pictures.iterdir())))),
                "crop_scale": [0.6, 1.0],
            },
            "train": {
                "batch_size": 16,
                "weight_decay": 0.05,
                "log_every": 20,
                "seed": seed,
                "device": "cpu",
                **optimizer,
            },
            "checkpoint": {"every_steps": 200},
        }
    )
    with join_ranks("cpu") as ranks, StopSignal() as stop:
        train(recipe, run, ranks, False, stop)


# ---- results ------------------------------------------------------------------------------------


def _sum_up(args: argparse.Namespace, scenes: Path, detector: Path) -> None:
    """Detect in the scenes held out by every network, and write numbers and picture."""
    pictures = open_boxes(scenes, "instances_val2017.json")
    finder = Detector(str(detector), pictures.classes, str(pictures.source))
    scores, shown = {}, {}
    for name, encoder in _encoders(args.output).items():
        results = [
            finder.detect(encoder, pictures.picture(number), SIZE, _TOP)
            for number in range(len(pictures))
        ]
        scores[name], shown[name] = average_precision(pictures, results), results
    gain = scores["distilled"][0]["AP50"] - scores["untrained"][0]["AP50"]
    about = {
        "command": " ".join(["python", "benchmarks/tiny_detector.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "margin": MARGIN,
        "gain": gain,
        "reached": gain >= MARGIN,
        "scores": {name: {"all": all_, "by class": own} for name, (all_, own) in scores.items()},
    }
    (args.output / "detection.json").write_text(json.dumps(about, indent=1))
    text = _markdown(scores)
    (args.output / "detection.md").write_text(text)
    _draw(args.output / "detection.png", pictures, shown)
    print(text)
    verdict = "reached" if gain >= MARGIN else "missed"
    print(f"AP50 of the distilled student less the untrained one's: {gain:.3f} (margin {MARGIN})")
    print(f"margin {verdict}; wrote {args.output}/detection.json, detection.md, detection.png")


def _encoders(output: Path) -> dict[str, Encoder]:
    """What the detector's decoder reads: its own backbone, and the students."""
    distilled, teacher = open_rows(
        str(output / "distilled"), ["backbone"], True, None, "cpu", output
    )
    (untrained,) = open_rows(str(output / "untrained"), ["backbone"], False, None, "cpu", output)
    rows = (teacher, untrained, distilled)
    return {name: row.encoder for name, row in zip(_ROWS, rows, strict=True)}


def _markdown(scores: dict[str, tuple[dict[str, float], dict[str, float]]]) -> str:
    lines = [
        "| maps of | " + " | ".join((*_SCORES, *(f"AP {name}" for name in CLASSES))) + " |",
        "|---" * (1 + len(_SCORES) + len(CLASSES)) + "|",
    ]
    for name, (whole, by_class) in scores.items():
        values = [whole[score] for score in _SCORES]
        values += [by_class.get(label, math.nan) for label in CLASSES]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _draw(path: Path, pictures: BoxedPictures, shown: dict[str, list[Detections]]) -> None:
    """The first scenes with the true boxes and with those detected whose score exceeds _SHOWN."""
    columns = ("truth", *shown)
    count = min(4, len(pictures))
    figure, axes = plt.subplots(
        count, len(columns), figsize=(2.8 * len(columns), 2.7 * count), squeeze=False
    )
    figure.set_layout_engine("constrained")
    for number, line in enumerate(axes):
        picture, truth = pictures.picture(number), pictures.boxes[number]
        for axis, name in zip(line, columns, strict=True):
            axis.imshow(np.asarray(picture))
            axis.set_axis_off()
            axis.set_autoscale_on(False)  # a box at the edge must not move the picture
            if number == 0:
                axis.set_title(name, fontsize=10)
            if name == "truth":
                rows = zip(truth.edges, truth.labels, [""] * len(truth.labels), strict=True)
            else:
                scores, labels, boxes = shown[name][number]
                rows = (
                    (box * SIZE, label, f" {score:.2f}")
                    for score, label, box in zip(scores, labels, boxes, strict=True)
                    if score > _SHOWN
                )
            for edges, label, score in rows:
                draw_box(axis, edges, f"C{label}", f"{pictures.classes[label]}{score}")
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
