"""Graphs of varying sizes: position embeddings of any grid, and an error for sides that are cut off
otherwise.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from contract.errors import UserError
from distill.heads import save_head
from export.compose import write_fused
from export.graph import build_parts, open_student
from export.resample import resample_grid
from export.runtimes.onnx import OnnxRuntime
from export.runtimes.openvino import OpenVINO
from export.to_onnx import OPSET, export_part


@pytest.fixture(scope="module")
def graphs(expensive, small_bundle, tmp_path_factory) -> dict[str, Path]:
    """The backbone and the whole student for varying sizes, by name."""
    folder, student = tmp_path_factory.mktemp("graphs"), open_student(small_bundle.parent / "run")
    *own, fused = build_parts(student, None, None)
    paths = {
        part.signature.graph: folder / f"{part.signature.graph}.onnx" for part in (*own, fused)
    }
    for part in own:
        export_part(part, student.stride, 4, paths[part.signature.graph], {})
    write_fused([*own, fused], paths, {}, OPSET["fp32"])
    return {graph: paths[graph] for graph in ("backbone", "fused")}


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
def test_sides_that_are_no_multiple_of_the_stride_are_refused(kind, graphs):
    runtime = kind(graphs)
    for graph in graphs:
        assert len(runtime.run(graph, {"image": np.zeros((2, 64, 80, 3), np.uint8)})[0]) == 2
        for size in ((70, 64), (64, 75), (72, 72), (64, 8)):
            with pytest.raises(UserError, match=f"{runtime.name}: graph '{graph}'"):
                runtime.run(graph, {"image": np.zeros((1, *size, 3), np.uint8)})


def test_a_head_that_was_scored_with_another_view_is_named(small_bundle, tmp_path, caplog):
    run = shutil.copytree(small_bundle.parent / "run", tmp_path / "run")
    student = open_student(run)
    assert "was scored with view" not in caplog.text
    head = student.heads[0]
    save_head(run / "heads", head.task, head.module, head.about | {"view": "squash"})
    open_student(run, view="squash")
    assert "was scored with view" not in caplog.text
    open_student(run)
    assert f"head {head.task} was scored with view squash, but the bundle has" in caplog.text


def test_position_embeddings_by_matrices_are_timms():
    posemb = torch.randn(1, 1 + 7 * 7, 16)
    for size in ((7, 7), (14, 14), (5, 9), (3, 4), (20, 6)):
        wanted = resample_abs_pos_embed(posemb, list(size), [7, 7], num_prefix_tokens=1)
        torch.testing.assert_close(
            resample_grid(posemb, list(size), [7, 7]), wanted, atol=1e-5, rtol=1e-5
        )
    assert torch.equal(resample_grid(posemb, [7, 7], [7, 7]), posemb)
