"""A run as a folder that timm and transformers load: written aside, compared, then named."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor

from contract.files import new_folder
from contract.views import ViewPolicy
from distill.methods.deployment import Deployment
from distill.models.sources import ADAPTED
from distill.models.weights import save_tensors
from distill.runs import Run, load_run
from export.hub import describe
from export.hub.card import write_card
from export.hub.gate import Row, check, reference
from export.hub.network import Network, describe_network, pictures_seen
from export.hub.remote.heads import Heads
from export.photographs import choose

WEIGHTS, HEADS = "model.safetensors", "teacher_heads.safetensors"


def assemble(
    folder: Path, place: Path, images: Path | None, licence: str | None, view: str | None = None
) -> list[Row]:
    """Write the folder `place` for the run in `folder`; returns what was compared.

    Raises UserError for a run that cannot be read or that no loader can take, and Failure where
    the loaders disagree with the student; nothing is written then.
    """
    run = load_run(folder)
    deployment = run.method.deploy()
    size = run.recipe.student.image_size
    policy = ViewPolicy.parse(view or run.recipe.view).on(run.recipe.student.mean)
    seen = pictures_seen(policy, run.recipe.student.mean)
    photos = [photo for _, photo in choose(images, [(size, size)]).compared]
    wanted = reference(deployment, photos, size, policy)
    network = describe_network(run, deployment.student, wanted.pixels, wanted.backbone, seen)
    whole = not describe.is_adapted(deployment)
    with new_folder(place, f"--output {place}") as aside:
        _write(aside, run, deployment, network)
        layout = deployment.student.layout if whole else None
        rows = check(aside, network, layout, wanted)
        write_card(aside, run, deployment, network, rows, wanted, licence)
    return rows


def _write(folder: Path, run: Run, deployment: Deployment, network: Network) -> None:
    whole = not describe.is_adapted(deployment)
    config = _config(run, deployment, network)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = network.state if whole else deployment.student.state_dict()
    about = {"format": "pt", "student_sha256": run.sha256}  # transformers asks for the format
    save_tensors(folder / WEIGHTS, state, about)
    if deployment.heads:
        coupling = deployment.coupling if list(deployment.coupling.parameters()) else None
        heads = Heads({label: head for label, head in deployment.heads.items()}, coupling)
        save_tensors(folder / HEADS, _once(heads.state_dict()), about)
    code = describe.code(run, deployment, _HEADER)
    (folder / f"{describe.MODELLING}.py").write_text(code, encoding="utf-8")


_HEADER = '''\
"""A student and its teachers' heads, made from the modules of vfm-distill (Apache-2.0) by its
`export.hub`. Needs torch, timm and transformers.
"""'''


def _config(run: Run, deployment: Deployment, network: Network) -> dict[str, Any]:
    """timm's entries, transformers', and `vfm_distill`."""
    config: dict[str, Any] = {
        "architecture": network.architecture,
        "model_args": network.model_args,
        "num_classes": 0,
        "num_features": deployment.student.width,
        "auto_map": {
            "AutoConfig": f"{describe.MODELLING}.VFMDistillConfig",
            "AutoModel": f"{describe.MODELLING}.VFMDistillModel",
        },
        "architectures": ["VFMDistillModel"],
        "image_processor_type": "TimmWrapperImageProcessor",
        "pretrained_cfg": network.pretrained_cfg,
        "vfm_distill": describe.about(run, deployment),
        "versions": {
            "timm": timm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if describe.is_adapted(deployment):
        own = {"architecture": network.architecture, "model_args": network.model_args}
        # a name and a type that timm and transformers do not know: its ViT is not the student
        return config | {
            "architecture": ADAPTED,
            "model_args": {},
            "model_type": "vfm_distill",
            "vfm_distill": config["vfm_distill"] | own,
        }
    # what timm pools of some networks is not the student's summary: better none
    return config | {"model_type": "timm_wrapper", "do_pooling": network.pooled}


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the first of their names: heads share some."""
    first: dict[tuple[int, Sequence[int]], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name] for name in first.values()}
