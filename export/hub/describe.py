"""What the code of a model repository is made of, and told, for the student of a run."""

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from contract.errors import UserError
from contract.licences import LicenceRecord
from distill.licences import hub_places, last_part, shortened_name, without_folders
from distill.methods.deployment import Deployment
from distill.recipe_files import RecipeLoader
from distill.recipe_io import dump_recipe
from distill.runs import Run
from export.hub.code import Name, bundle

FORMAT = 1
"""Version of the entry `vfm_distill` of a config.json."""

MODELLING = "modeling_vfm_distill"

_REMOTE = "export.hub.remote"
_PATHS = ("path", "data")
"""Last parts of a recipe's keys whose values are places on the machine that trained."""

_NAMES = ("name", "checkpoint")
"""Of those that may be such places, or a hub's, a package's or timm's."""


def is_adapted(deployment: Deployment) -> bool:
    """Whether the student is more than a network of timm's."""
    return bool(deployment.student.map_strides)


def about(run: Run, deployment: Deployment) -> dict[str, Any]:
    """The entry `vfm_distill` of config.json: the recipe, and all that the repository's code needs
    beside timm's entries.
    """
    student, recipe = deployment.student, run.recipe
    layout = student.layout._asdict()
    result = {
        "format": FORMAT,
        "method": recipe.method,
        "steps": run.step,
        "student_sha256": run.sha256,
        "layout": {key: layout[key] for key in ("axes", "width", "stride", "prefix")}
        | {"has_class_token": student.has_class_token},
        "second_token": student.second_token,
        # a list, since the order counts and transformers sorts what it saves
        "dims": [[label, _widths(run, label)] for label in deployment.heads],
        "normalize": _normalize(run),
        "heads": _HEADS[_method(run)](run, deployment)[1],
        "recipe": public_recipe(run),
        # read where the folder is a teacher, or the start of a student, in its turn
        "licences": [record.model_dump(mode="json") for record in public_licences(run)],
    }
    if is_adapted(deployment):
        adapter = recipe.kpu.adapter.model_dump(mode="json")
        result["adapter"] = adapter
    return result


def code(run: Run, deployment: Deployment, head: str) -> str:
    """The repository's code, which begins with the lines `head`.

    Configuration and model are in one file: transformers knows models by the class of their
    configuration, and takes equal files of folders of one name for the same module.
    """
    module, _ = _HEADS[_method(run)](run, deployment)

    def remote(name: str, definition: str) -> Name:
        return Name(f"{_REMOTE}.{name}", definition)

    replaced = {
        remote("none", "build_heads"): remote(module, "build_heads"),
        Name("distill.models.student", "Student"): remote("student", "Student"),
    }
    if is_adapted(deployment):
        definition = "VFMDistillConfig"
        replaced[remote("configuration", definition)] = remote("adapter_configuration", definition)
        for name in ("build_student", "PREFIX"):
            replaced[remote("bare", name)] = remote("adapter", name)
    if _is_running(run):
        replaced[remote("fitted", "restoring")] = remote("running", "restoring")
    return bundle(head, [remote("model", "VFMDistillModel")], replaced)


def public_recipe(run: Run) -> dict[str, Any]:
    """The recipe as plain data. Of files and folders only the last part of the name is told."""
    values = yaml.load(dump_recipe(run.recipe), Loader=RecipeLoader)
    on_hub = hub_places(run.licences)

    def shorten(value: Any, key: str, inside: bool) -> Any:
        if isinstance(value, dict):
            return {k: shorten(v, k, inside or k == "kwargs") for k, v in value.items()}
        if isinstance(value, list):
            return [shorten(item, key, inside) for item in value]
        if not isinstance(value, str):
            return value
        if inside or key in _PATHS:  # nobody knows what a function's argument is
            return last_part(value)
        return shortened_name(value, on_hub) if key in _NAMES else value

    return shorten(values, "", inside=False)


def public_licences(run: Run) -> list[LicenceRecord]:
    """What the student inherits. Of files and folders only the last part of the name is told."""
    return [without_folders(record) for record in run.licences]


def _widths(run: Run, label: str) -> list[int | None]:
    dims = run.dims[label]
    return [dims.summary, dims.patches, *dims.maps]


def _method(run: Run) -> str:
    if run.recipe.method not in _HEADS:
        raise UserError(
            f"method = {run.recipe.method}: its heads cannot be rebuilt by other libraries: add it "
            "to export/hub/describe.py, or export a bundle with export.run"
        )
    return run.recipe.method


def _normalize(run: Run) -> str:
    """How targets were normalised by fitted statistics."""
    mode = run.recipe.targets.normalize
    if run.recipe.method != "sefa":
        return mode
    own = run.recipe.sefa.standardize
    if own != "fit":
        return own
    return "standardize" if mode == "none" else mode


def _is_running(run: Run) -> bool:
    """Whether its targets were normalised by running statistics."""
    method = run.recipe.method
    return method == "unic" or (method == "sefa" and run.recipe.sefa.standardize == "ema")


def _umt(run: Run, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    config = run.recipe.umt
    return "umt", config.model_dump(mode="json") | {"cross_mode": config.cross_mode}


def _plain(run: Run, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    hidden = run.recipe.plain.hidden_dim
    return "plain", {"hidden": deployment.student.width if hidden == "auto" else hidden}


def _sefa(run: Run, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    config = run.recipe.sefa
    settings = {"hidden": [config.hidden, config.hidden]}
    if config.head == "dino_literal":
        return "bottleneck", settings | {"bottleneck": run.recipe.ssl.bottleneck}
    return "projected", settings


def _unic(run: Run, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    return "projected", {"hidden": [run.recipe.unic.last_hidden]}


def _kpu(run: Run, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    hidden = run.recipe.kpu.hidden
    levels = {label: list(head.head.levels) for label, head in deployment.heads.items()}
    width = deployment.student.width
    return "kpu", {"hidden": width if hidden == "auto" else hidden, "levels": levels}


_HEADS: Mapping[str, Callable[[Run, Deployment], tuple[str, dict[str, Any]]]] = {
    "umt": _umt,
    "plain": _plain,
    "sefa": _sefa,
    "unic": _unic,
    "kpu": _kpu,
}
"""By method, which file of `remote/` builds the heads and what it is told."""
