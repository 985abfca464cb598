"""A student with further maps, and heads that read one or are absent."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from contract.errors import UserError
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment, ShippedHead
from distill.methods.losses import Prediction
from distill.models.preprocess import Preprocess
from export.compose import write_fused
from export.graph import Student, build_parts
from export.parity import reference
from export.to_onnx import export_part

STRIDES = (4, 8, 16, 32)
SIZE, WIDTH = 64, 8


class ToyStudent(nn.Module):
    family, width, stride, prefix, has_class_token = "cnn", WIDTH, 16, 0, False
    map_strides, map_widths = STRIDES, (WIDTH,) * 4
    second_token = False

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, WIDTH, s, stride=s) for s in STRIDES)

    def forward(self, images):
        maps = tuple(level(images).permute(0, 2, 3, 1) for level in self.levels)
        return Features(maps[2].mean((1, 2)), maps[2], maps)


class ToyHead(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.linear = nn.Linear(WIDTH, out)

    def forward(self, features, grid):
        level = features.maps[STRIDES.index(8)]
        assert tuple(grid) == (level.shape[1] // 2, level.shape[2] // 2)  # of stride 16
        return Prediction(None, self.linear(level), None)


def toy(with_head=True):
    torch.manual_seed(0)
    head = ShippedHead(ToyHead(5), ("maps.8",), has_token=False, free_length=("patches",))
    heads = {"detector": head} if with_head else {}
    preprocess = Preprocess(SIZE, (0.5,) * 3, (0.25,) * 3)
    deployment = Deployment(preprocess, ToyStudent(), nn.Identity(), heads)
    run = SimpleNamespace(dims={"detector": FeatureDims(None, 5)})
    return Student(run, deployment, (), 16, "0" * 64)


def run_graph(part, tensors, folder):
    path = folder / f"{part.signature.graph}.onnx"
    if not path.exists():
        export_part(part, 16, 4, path, {}, 20)
    session = onnxruntime.InferenceSession(path)
    feeds = {port.name: tensors[port.name] for port in part.signature.inputs}
    names = [port.name for port in part.signature.outputs]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_a_head_reads_one_map_through_onnx(tmp_path):
    student = toy()
    parts = {part.signature.graph: part for part in build_parts(student, SIZE, SIZE)}
    head = parts["head_detector"].signature
    assert [port.name for port in head.inputs] == ["features_s8"]
    assert [(port.name, port.axes) for port in head.outputs] == [
        ("detector_patches", ("batch", 64, 5))
    ]
    image = torch.randint(256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    wanted = reference(student, list(parts.values()), image)
    given = run_graph(parts["backbone"], {"image": image.numpy()}, tmp_path)
    results = {**given, **run_graph(parts["head_detector"], given, tmp_path)}
    write_fused(list(parts.values()), {name: tmp_path / f"{name}.onnx" for name in parts}, {}, 20)
    fused = run_graph(parts["fused"], {"image": image.numpy()}, tmp_path)
    assert {f"backbone_s{stride}" for stride in STRIDES} < set(fused)
    for outputs in (results, fused):
        for name, value in outputs.items():
            np.testing.assert_allclose(value, wanted[name], atol=1e-4, err_msg=name)


def test_a_student_without_heads_has_backbone_and_fused():
    parts = build_parts(toy(with_head=False), SIZE, SIZE)
    assert [part.signature.graph for part in parts] == ["backbone", "fused"]


def test_a_head_of_further_maps_is_refused_rather_than_cut_short():
    class Maps(ToyHead):
        def forward(self, features, grid):
            return super().forward(features, grid)._replace(maps=(features.maps[0],))

    student = toy()
    student.deployment.heads["detector"] = Maps(5)
    shipped = student.deployment.shipped
    shipped["detector"] = shipped["detector"]._replace(
        module=student.deployment.heads["detector"], reads=("maps.4", "maps.8")
    )
    head = next(p for p in build_parts(student, SIZE, SIZE) if p.signature.graph == "head_detector")
    levels = [torch.zeros(1, SIZE // stride, SIZE // stride, WIDTH) for stride in (4, 8)]
    with pytest.raises(UserError, match="of which strides"):
        head.module(*levels)
