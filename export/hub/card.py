"""The model card, README.md: what the student is, and how each library loads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from contract.licences import LicenceRecord
from distill.evaluate.report import read_scores
from distill.figures import pca_figure
from distill.licences import hub_places, shortened_name
from distill.methods.deployment import BACKBONE, Deployment
from distill.runs import Run
from export.hub.describe import is_adapted, public_licences
from export.hub.gate import Reference, Row
from export.hub.network import Network

PICTURE = "features.png"
_UNKNOWN = "unknown"
_BAR = r"\|"


def write_card(
    folder: Path,
    run: Run,
    deployment: Deployment,
    network: Network,
    rows: Sequence[Row],
    wanted: Reference,
    licence: str | None,
) -> None:
    """Write README.md and its picture into a folder; `licence` is the student's, by default what
    its teachers' agree on, else "other".
    """
    _draw(folder / PICTURE, wanted)
    inherited = public_licences(run)
    front = yaml.safe_dump(_front(deployment, inherited, licence), sort_keys=False)
    parts = [
        f"---\n{front}---",
        _head(run, deployment),
        f"![photographs, and the student's features]({PICTURE})\n\n*Photographs, the student's "
        "map, and its predictions of the teachers' (principal components of each).*",
        "## Loading",
        *_loading(run, deployment, network),
        _checked(rows),
        "## Teachers and licences",
        _teachers(run, inherited),
        "## Training",
        _training(run),
        *_scores(run),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front(
    deployment: Deployment, inherited: Sequence[LicenceRecord], licence: str | None
) -> dict[str, Any]:
    adapted = is_adapted(deployment)
    known = {record.licence for record in inherited} - {None}
    agreed = known.pop() if len(known) == 1 and not any(r.flags for r in inherited) else None
    front: dict[str, Any] = {"library_name": "transformers" if adapted else "timm"}
    front["license"] = licence or agreed or "other"
    if front["license"] == "other":
        front["license_name"] = "inherited-from-teachers"
        front["license_link"] = "README.md#teachers-and-licences"
    front["pipeline_tag"] = "image-feature-extraction"
    tags = ["vfm-distill", "knowledge-distillation", "transformers", *([] if adapted else ["timm"])]
    return front | {"tags": tags}


def _head(run: Run, deployment: Deployment) -> str:
    student, recipe = deployment.student, run.recipe
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    kind = " inside an adapter" if is_adapted(deployment) else ""
    return (
        f"# {run.folder.resolve().name}\n\n"
        f"A `{shortened_name(recipe.student.name, set())}`{kind} ({millions:.1f} M parameters, "
        f"{student.width} channels, "
        f"{recipe.student.image_size} px, {student.stride} px a position), distilled from "
        f"{len(recipe.teachers)} teacher{'s' if len(recipe.teachers) != 1 else ''} by the method "
        f"`{recipe.method}` of vfm-distill."
    )


_SHOWN = {
    "squash": "whole pictures, their aspect ratio not kept,",
    "center": "the centre of pictures ({crop_pct:g} of their shorter side)",
    "border": "whole pictures, padded with the mean colour,",
}
"""What timm's transforms show, by its name of the mode."""


def _loading(run: Run, deployment: Deployment, network: Network) -> list[str]:
    """How each library loads the folder, and what it then gives."""
    size, cfg = run.recipe.student.image_size, network.pretrained_cfg
    parts = [
        "`FOLDER` is this folder, or its name on the hub (for timm `hf-hub:OWNER/NAME` in place of "
        f"`local-dir:FOLDER`). The image processor shows {_SHOWN[cfg['crop_mode']].format(**cfg)} "
        f"at {size} x {size} pixels ({cfg['interpolation']}); sides must be multiples of "
        f"{deployment.student.stride}."
    ]
    if is_adapted(deployment):
        parts.append(
            "**timm, and transformers without the code here, cannot load this student**: its ViT "
            "stands inside a trained adapter, whose injectors change what the ViT says, so that "
            "the ViT alone would be another network. Both refuse the folder."
        )
    else:
        parts += [_timm_loading(deployment, network), _transformers_loading(network)]
    heads = list(deployment.heads)
    lines = [
        "### transformers, with the code in this folder",
        "Backbone and heads of the teachers; read `modeling_vfm_distill.py` before you run it.",
        "```python",
        "model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)",
        "output = model(pixel_values)",
        "output.pooler_output, output.patches  # [B, d], [B, h, w, d]",
    ]
    if deployment.student.second_token:
        lines.append("output.second  # [B, d], the second class token")
    if deployment.student.map_strides:
        strides = ", ".join(f"1/{stride}" for stride in deployment.student.map_strides)
        lines.append(f"output.maps  # four maps [B, h, w, d] of {strides}")
    if heads:
        first = heads[0]
        lines += [
            f'output.teachers["{first}"].patches  # in the units of the teacher; .token',
            f'model(pixel_values, teachers=["{first}"])  # that head alone; []: none',
        ]
    lines.append("```")
    if not heads:
        lines.append("This student has no heads: its method ships none.")
    parts.append("\n".join([lines[0], "", lines[1], "", *lines[2:]]))
    parts.append("Heads of tasks (segmentation, depth, …) are not in this folder.")
    return parts


def _timm_loading(deployment: Deployment, network: Network) -> str:
    output = _output(deployment)
    call = "model(pixels)" if network.pooled else _own_pooling(deployment)
    note = (
        ""
        if network.pooled
        else (
            "\n\n`model(pixels)` gives another vector: timm puts a norm or a convolution that was "
            "never trained behind the pooling. Take the call above."
        )
    )
    return (
        "### timm\n\n```python\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"output = model.forward_features(pixels)  # {output}\n"
        f"summary = {call}  # [B, {deployment.student.width}]\n```{note}"
    )


def _transformers_loading(network: Network) -> str:
    note = (
        "`pooler_output` is the summary."
        if network.pooled
        else "There is no `pooler_output`: what timm pools is not the student's summary; take the "
        "call above of `last_hidden_state`."
    )
    return (
        "### transformers\n\n```python\n"
        "processor = AutoImageProcessor.from_pretrained(FOLDER)\n"
        "output = AutoModel.from_pretrained(FOLDER)(**processor(picture))\n"
        'features = pipeline("image-feature-extraction", model=FOLDER)(picture)\n```\n\n'
        f"`last_hidden_state` is timm's `output`. {note}"
    )


def _output(deployment: Deployment) -> str:
    layout = deployment.student.layout
    if layout.axes != "NLC":
        return "[B, d, h, w]" if layout.axes == "NCHW" else "[B, h, w, d]"
    second = ", token 1 the second class token" if deployment.student.second_token else ""
    kind = "the class token first" if layout.has_class_token else "no class token"
    return f"[B, {layout.prefix} + h * w, d], {kind}{second}; patches: output[:, {layout.prefix}:]"


def _own_pooling(deployment: Deployment) -> str:
    layout = deployment.student.layout
    if layout.axes == "NLC":
        if layout.has_class_token:
            return "output[:, 0]"
        return f"output[:, {layout.prefix}:].mean(1)"
    return "output.mean((2, 3))" if layout.axes == "NCHW" else "output.mean((1, 2))"


def _checked(rows: Sequence[Row]) -> str:
    worst = max(row.difference for row in rows)
    return (
        "Before this folder was written, all that is said above was loaded in a process without "
        f"vfm-distill and compared on photographs: {len(rows)} comparisons, largest difference "
        f"{worst:.2g} of the largest value."
    )


def _teachers(run: Run, inherited: Sequence[LicenceRecord]) -> str:
    roles = {teacher.label: teacher.role for teacher in run.recipe.teachers}
    roles["student"] = "the student's start"
    lines = ["| teacher | role | network | licence of its weights | |", "|---|---|---|---|---|"]
    for record in inherited:
        random = not record.licence and not record.flags
        cells = (
            f"`{record.label}`",
            roles.get(record.label, "a teacher's own"),
            f"`{record.name}`",
            "none: random weights" if random else record.licence or _UNKNOWN,
            ", ".join(flag for flag in record.flags if flag != "unknown"),
        )
        lines.append(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |")
    lines.append(
        "\nA student may inherit conditions of its teachers' licences: check those that are "
        "flagged or unknown before you use it. The code in this folder is Apache-2.0."
    )
    return "\n".join(lines)


def _training(run: Run) -> str:
    recipe = run.recipe
    data = recipe.data
    count = f", {data.images:,} pictures" if data.images else ""
    return (
        f"{run.step or 'An unknown number of'} steps of {recipe.train.batch_size} pictures "
        f"(`data.kind: {data.kind}`{count}), learning rate {recipe.train.lr:g}. The whole recipe "
        "is `vfm_distill.recipe` in config.json."
    )


def _scores(run: Run) -> list[str]:
    """The run's evaluation, if there is one."""
    rows = read_scores(run.folder / "evaluation" / "evaluation.json")
    lines = ["| features | task | score | value |", "|---|---|---|---|"]
    for name, tasks in rows.items():
        row = _public_row(name, run)
        for task, entry in tasks.items():
            scores = [
                (name, v) for name, v in entry["scores"].items() if isinstance(v, int | float)
            ]
            lines += [f"| {row} | {task} | {name} | {value:.3f} |" for name, value in scores]
    if len(lines) == 2:
        return []
    note = (
        "Scores of `distill.evaluate`; evaluation.json of the run says which view of the pictures "
        "each was taken with."
    )
    return ["## Evaluation", "\n".join(lines), note]


def _public_row(name: str, run: Run) -> str:
    """A row's name: that of a teacher has its network's (`distill/evaluate/cast.py`)."""
    on_hub = hub_places(run.licences)
    for teacher in run.recipe.teachers:
        if name == f"teacher {teacher.label} ({teacher.name})":
            return f"teacher {teacher.label} ({shortened_name(teacher.name, on_hub)})"
    return shortened_name(name, on_hub)


def _draw(path: Path, wanted: Reference) -> None:
    size = wanted.pixels.shape[-2:]
    photos = [Image.fromarray(wanted.view.pixels(photo, *size)) for photo in wanted.photos[:3]]
    count = len(photos)
    groups = [
        {("student" if label == BACKBONE else label): prediction.patches[:count]}
        for label, prediction in wanted.predictions.items()
    ]
    pca_figure(path, photos, groups)
