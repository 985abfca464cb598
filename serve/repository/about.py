"""What a repository's configurations tell clients of a bundle and of its tasks' outputs."""

import hashlib
import json

from tritonclient.grpc.model_config_pb2 import ModelConfig

from contract.tasks import TASKS, Task
from serve.bundle import Bundle


def about_bundle(bundle: Bundle) -> dict:
    """What a client may want to know of the bundle behind the front door."""
    manifest, resolution = bundle.manifest, bundle.manifest.resolution
    return {
        "student": manifest.student.network,
        "method": manifest.student.method,
        "precision": manifest.precision,
        "bundle": bundle.version,
        "dynamic": resolution.dynamic,
        "view": manifest.view,
        "mean": list(manifest.preprocessing.mean),
        **resolution.limits,
        "teachers": [
            {"label": t.label, "role": t.role, "licence": t.licence} for t in manifest.teachers
        ],
        "tasks": {
            name: facts(bundle, task) for name, task in TASKS.items() if name in bundle.graphs
        },
    }


def facts(bundle: Bundle, task: Task) -> dict:
    """What the answer of a task's head means: names of classes, unit, pixels of a cell's side, as
    far as it has them.
    """
    about = bundle.graphs[task.name].about
    return {name: about[name] for name in task.facts if about.get(name)}


def tell_facts(config: ModelConfig, bundle: Bundle, task: Task) -> None:
    """Set the parameters by which clients know what a map means, and the size it is made at."""
    size = {"height": bundle.manifest.resolution.height, "width": bundle.manifest.resolution.width}
    for name, value in (facts(bundle, task) | size).items():
        config.parameters[name].string_value = (
            value if isinstance(value, str) else json.dumps(value)
        )


def cell_of(bundle: Bundle, task: Task) -> float:
    """Pixels of the side of what one value of a task's head stands for; a DPT head's output is
    finer than the patches.
    """
    return bundle.graphs[task.name].about.get("stride", bundle.manifest.resolution.stride)


def facts_digest(bundle: Bundle, task: Task) -> str:
    """A digest of all that a reader of a task head's output must know of the bundle."""
    known = [facts(bundle, task), cell_of(bundle, task)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
