"""Zero-shot detection (KPU section 4.3): a detector that reads the maps that a student predicts, in
place of those of its own backbone, and that is asked for all classes at once.

AP as COCO defines it, by `faster-coco-eval`. Pictures keep their shape: the shorter side has
`detection.size` pixels, the longer one 1333 / 800 of it at most, as GroundingDINO's have; a student
gets the closest multiples of its patch.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from contract.detection import Detections, detections, text_inputs
from contract.errors import UserError, first_line
from distill.evaluate.boxes import BoxedPictures, open_boxes
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder, RunEncoder
from distill.evaluate.extract import cast, precision_on
from distill.evaluate.outcome import NotApplicable, Outcome, first_alone
from distill.evaluate.pictures import boxes_figure
from distill.features import resize_map
from distill.models.grounding_dino import (
    STRIDES,
    DetectorRest,
    TextSide,
    is_same_checkpoint,
    load_detector,
    open_vocabulary,
    positions,
)

log = logging.getLogger(__name__)

_LONGEST = 1333 / 800
"""The longer side at most, in terms of the shorter one."""

_SHOWN = 4
"""Pictures in the figure."""

_SCORES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
"""The first of COCO's twelve numbers."""


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig, folder: Path) -> Outcome:
    """COCO's AP of the boxes of all classes, and a figure `detection.png`.

    Raises NotApplicable for a network that no detector taught, and UserError for one that several
    taught, missing libraries, files that are missing or damaged, classes that do not fit into a
    prompt, pictures that become too small, and boxes that are NaN.
    """
    settings = config.detection
    if len(encoder.detectors) > 1:
        labels = [teacher.label for teacher in encoder.detectors]
        count = "two" if len(labels) == 2 else len(labels)
        raise UserError(
            f"{encoder.name}: the run has {count} detectors ({', '.join(labels)}): add "
            f"{' or '.join(f'--features {label}' for label in labels)}"
        )
    if not encoder.detectors:
        raise NotApplicable(
            f"{encoder.name}: detection needs the maps of a detector, which '{encoder.read_out}' "
            "does not give: train with a teacher of role detector (recipe kpu_vit_base), and use "
            "--features backbone"
        )
    (teacher,) = encoder.detectors
    source = settings.checkpoint or teacher.checkpoint
    if not source:
        raise UserError(
            "detection needs the detector that taught the student: set detection.checkpoint to its "
            "folder or its name on the Hugging Face hub"
        )
    _need_library()
    pictures = open_boxes(data, settings.annotations)
    detector = Detector(source, pictures.classes, str(pictures.source)).to(encoder.device)
    if not is_same_checkpoint(teacher.checkpoint, source):
        log.warning(
            "detection  %s: teacher '%s' was %s, not %s: boxes are only right if their backbones "
            "have the same weights",
            encoder.name,
            teacher.label,
            teacher.checkpoint or "random",
            source,
        )
    precision = precision_on(encoder.device, config.extract)
    results, shown, ranks = [], [], encoder.ranks
    numbers = ranks.deal(range(len(pictures)))
    for number in track(numbers, description="pictures", disable=not ranks.draws):
        picture = pictures.picture(number)
        result = detector.detect(encoder, picture, settings.size, settings.top, precision)
        results.append(result)
        if len(shown) < _SHOWN:
            shown.append((picture, pictures.boxes[number], result))
    results, shown = ranks.collect(results), ranks.collect(shown)[:_SHOWN]
    first_alone(ranks)
    scores, per_class = average_precision(pictures, results)
    file = boxes_figure(folder / "detection.png", shown, pictures.classes, settings.threshold)
    details = {"pictures": len(pictures), "size": settings.size, "detector": source}
    return Outcome(scores, details | {"per_class": per_class}, (file,))


class Detector(nn.Module):
    """A detector without its image backbone, and the prompt of some labels.

    Raises UserError as `load_detector` does, and in the name of `asked` for labels that cannot be
    asked for.
    """

    def __init__(self, source: str, labels: Sequence[str], asked: str) -> None:
        super().__init__()
        field = "detection.checkpoint"
        model = load_detector(source, field)
        _, tokenizer = open_vocabulary(source, field, model.config)
        try:
            inputs = text_inputs(labels, tokenizer)
        except ValueError as error:
            raise UserError(f"{asked}: its categories: {error}") from error
        self.label_map = inputs.label_map
        self.widths = tuple(model.model.backbone.conv_encoder.intermediate_channel_sizes)
        ids, self_mask, position_ids = (torch.from_numpy(values) for values in inputs[:3])
        with torch.inference_mode():
            text = TextSide(model)(ids, self_mask, position_ids)
        for name, tensor in {
            "text": text,
            "text_mask": torch.ones_like(ids, dtype=torch.bool),
            "self_mask": self_mask,
            "position_ids": position_ids,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self.rest = DetectorRest(model)

    @torch.inference_mode()
    def detect(
        self,
        encoder: Encoder,
        picture: Image.Image,
        size: int,
        top: int,
        precision: str = "fp32",
    ) -> Detections:
        """The `top` best boxes in a picture whose shorter side becomes `size` pixels. The encoder
        runs in `precision`, the detector in float32.

        Raises UserError as `forward`, and for boxes that are NaN.
        """
        # a detector takes any size, a student multiples of its patch
        unit = encoder.stride if isinstance(encoder, RunEncoder) else 1
        width, height = fitted(*picture.size, size, unit)
        pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
        images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).to(encoder.device)
        with cast(encoder.device, precision):
            maps = encoder.detector_maps(images)
        pair = self(maps, (height, width))
        # not infinity, which logits beyond the text are
        if any(values.isnan().any() for values in pair):
            raise UserError(
                f"{encoder.name}: its boxes hold NaN: check its weights and the detector's"
            )
        logits, boxes = (values[0].cpu().numpy() for values in pair)
        return detections(logits, boxes, self.label_map, top)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Logits [1, queries, 256] and boxes [1, queries, 4] from a picture's maps
        [1, h_l, w_l, C_l], of `size` (height, width) pixels; raises UserError for maps of other
        widths, and for fewer positions than boxes.
        """
        widths = tuple(level.shape[-1] for level in maps)
        if widths != self.widths:
            raise UserError(
                f"detection.checkpoint: its maps are {self.widths} wide, but those of the network "
                f"are {widths}: name the detector that taught it"
            )
        if len({level.shape[1:3] for level in maps}) == 1:
            # of a student without a pyramid, whose maps have one grid
            grids = [tuple(math.ceil(side / stride) for side in size) for stride in STRIDES]
            maps = [resize_map(level, grid) for level, grid in zip(maps, grids, strict=True)]
        config = self.rest.core.config
        there = positions([level.shape[1:3] for level in maps], config.num_feature_levels)
        if there < config.num_queries:
            raise UserError(
                f"detection.size: a picture becomes {size[1]}x{size[0]} pixels, which have {there} "
                f"positions, too few for the detector's {config.num_queries} boxes: use a larger "
                "size"
            )
        try:
            return self.rest(maps, self.text, self.text_mask, self.self_mask, self.position_ids)
        except ValueError as error:  # of norms that see a single number
            raise UserError(
                f"detection.size: a picture becomes {size[1]}x{size[0]} pixels, too few for the "
                f"detector ({first_line(error)}): use a larger size"
            ) from error


def fitted(width: int, height: int, shorter: int, unit: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side becomes `shorter` pixels and whose longer
    one 1333 / 800 of that at most, as multiples of `unit`.
    """
    scale = min(shorter / min(width, height), _LONGEST * shorter / max(width, height))
    sides = (max(1, round(side * scale / unit)) * unit for side in (width, height))
    return tuple(sides)


def _need_library() -> None:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "detection needs faster-coco-eval: pip install 'vfm-distill[detection]'"
        ) from error


def average_precision(
    pictures: BoxedPictures, results: Sequence[Detections]
) -> tuple[dict[str, float], dict[str, float]]:
    """COCO's AP, AP50 and AP75, and by size of the objects where there are some; and AP by class.
    At most 100 boxes of a class count in a picture.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(_as_coco(pictures), print_function=log.debug)
    found = truth.loadRes(
        [
            {"image_id": number + 1, "category_id": label + 1, "bbox": box, "score": score}
            for number, (result, size) in enumerate(zip(results, pictures.sizes, strict=True))
            for box, label, score in zip(
                _corner_and_sides(result.boxes * np.array(size * 2)),
                result.labels.tolist(),
                result.scores.tolist(),
                strict=True,
            )
        ]
    )
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=log.debug)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    scores = {
        name: float(value)
        for name, value in zip(_SCORES, evaluation.stats, strict=False)
        if value >= 0  # -1: no object of the size
    }
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    by_class = {
        name: float(np.mean(values[values >= 0]))
        for name, values in zip(pictures.classes, np.moveaxis(precision, 2, 0), strict=True)
        if (values >= 0).any()
    }
    return scores, by_class


def _as_coco(pictures: BoxedPictures) -> dict:
    """The pictures in COCO's format, numbered from 1: 0 would count as unmatched."""
    annotations: list[dict] = []
    for number, boxes in enumerate(pictures.boxes):
        sides = _corner_and_sides(boxes.edges)
        rows = zip(sides, boxes.labels, boxes.areas, boxes.crowd, strict=True)
        for box, label, area, crowd in rows:
            annotation = {"id": len(annotations) + 1, "image_id": number + 1, "bbox": box}
            annotation |= {"category_id": int(label) + 1, "area": area, "iscrowd": int(crowd)}
            annotations.append(annotation)
    images = [
        {"id": number + 1, "width": width, "height": height}
        for number, (width, height) in enumerate(pictures.sizes)
    ]
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(pictures.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _corner_and_sides(edges: np.ndarray) -> list[list[float]]:
    """Boxes [n, 4] by their edges as x, y, width and height."""
    return np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], axis=1).tolist()
