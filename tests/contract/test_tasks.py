"""The table of tasks: what it says is what heads give and what the functions of contract/dense.py
make.
"""

import numpy as np

from contract import dense
from contract.signature import task_port
from contract.tasks import CLASSES, POSITIONS, TASKS, map_tasks


def test_outputs_have_the_names_axes_and_meanings_that_bundles_carry():
    ports = {name: task_port(task, 7, 16)[2:] for name, task in TASKS.items()}
    assert ports == {
        "classification": (("batch", 7), "a score per class"),
        "segmentation": (("batch", 16, 7), "a score per patch and class, row-major"),
        "depth": (("batch", 16), "metres at every patch, row-major"),
    }
    assert [task.output for task in TASKS.values()] == [
        "classification_logits",
        "segmentation_logits",
        "depth",
    ]
    cell = task_port(TASKS["depth"], 1, "depth_positions", "cell of 4 pixels")
    assert cell.axes == ("batch", "depth_positions")
    assert cell.meaning == "metres at every cell of 4 pixels, row-major"


def test_maps_are_what_their_functions_make():
    for task in map_tasks():
        assert task.dense
        sizes = {POSITIONS: 2 * 3, CLASSES: 5}
        shape = [sizes.get(axis, axis) for axis in task.axes]
        values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        result = getattr(dense, task.map.function)(values, 8, 12)
        assert result.dtype == task.map.dtype and result.shape == (2, 8, 12, *task.map.axes)


def test_names_of_models_and_outputs_are_told_apart():
    outputs = [task.output for task in TASKS.values()]
    maps = [task.map.name for task in map_tasks()]
    assert len({*outputs, *maps}) == len(outputs) + len(maps)
    assert not {"features", "features_encoded", "fused", "backbone", "zero_shot"} & set(TASKS)
