"""Graphs of networks that torch.export needs help with, and of those whose branches are merged."""

import signal
import sys

import onnx
import pytest
import torch
import torch.nn.functional as F
import yaml
from timm.layers import pad_same

from benchmarks import networks
from contract.errors import UserError
from contract.manifest import read_manifest
from distill.config import StudentConfig
from distill.methods.deployment import Deployment
from distill.models.preprocess import Preprocess
from distill.models.student import Student
from export import to_onnx
from export.graph import Student as Exported
from export.run import main as export
from export.traceable import pad_divisible, traceable
from tests.conftest import long_case, run_here, small_recipe

SMALL = {"layers": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]}


@pytest.mark.slow
def test_same_padding_is_right_at_every_size_the_stride_divides():
    config = StudentConfig(name="test_efficientnet", image_size=64, kwargs={"pad_type": "same"})
    student = Student(config).eval()
    assert any(type(part).__name__ == "Conv2dSame" for part in student.modules())
    half = (0.5, 0.5, 0.5)
    deployment = Deployment(Preprocess(64, half, half), student, torch.nn.Identity(), {})
    whole = Exported(None, deployment, (), student.stride, "")
    networks.check_export(whole, [(64, 64), (96, 32), (32, 160)], varying=True)


class Clipped(torch.nn.Module):
    """Bounds in tensors, one pair after another, as Gemma's linear layers have them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("least", torch.tensor(-0.5))
        self.register_buffer("most", torch.tensor(0.5))

    def forward(self, x):
        x = torch.clamp(self.module(x), self.least, self.most)
        return torch.clamp(x, self.least, self.most) * 2 + torch.clamp(x, self.least, self.most)


def test_bounds_that_the_exporters_optimizer_loses_are_in_the_graph(monkeypatch):
    student = Student(StudentConfig(name="test_resnet", image_size=64)).eval()
    student.net.maxpool = Clipped(student.net.maxpool)
    half, optimized, trace = (0.5, 0.5, 0.5), [], to_onnx._trace
    monkeypatch.setattr(
        to_onnx, "_trace", lambda *a, optimize: optimized.append(optimize) or trace(*a, optimize)
    )
    deployment = Deployment(Preprocess(64, half, half), student, torch.nn.Identity(), {})
    whole = Exported(None, deployment, (), student.stride, "")
    networks.check_export(whole, [(64, 64), (96, 32)], varying=True)
    assert optimized == [True, False]  # else onnxscript has been mended: trace once


def test_padding_that_varies_is_what_timm_computes_for_multiples():
    """`pad_same` is for numbers; the symbolic branch must give the same for every multiple."""

    class Sides(torch.nn.Module):
        def forward(self, x):
            return pad_divisible(x, (5, 3), (2, 4), (1, 2), 7.0)

    side = torch.export.Dim("side", min=2, max=64)
    varying = ({0: None, 1: None, 2: 4 * side, 3: 4 * side},)
    program = torch.export.export(Sides(), (torch.zeros(1, 1, 16, 16),), dynamic_shapes=varying)
    for size in (8, 20, 64):
        x = torch.randn(1, 1, size, size)
        assert torch.equal(program.module()(x), pad_same(x, (5, 3), (2, 4), (1, 2), 7.0))


@pytest.mark.parametrize("axes", [(2, 3, 4), (2,)], ids=["windows", "heads in the batch"])
def test_attention_has_four_axes_while_traced(axes):
    query, key, value = torch.randn(3, *axes, 5, 6).unbind()
    attend = F.scaled_dot_product_attention
    options = [{}, {"scale": 1.0}, {"attn_mask": torch.randn(*axes, 5, 5)}, {"is_causal": True}]
    wanted = [attend(query, key, value, **option) for option in options]
    with traceable():
        assert F.scaled_dot_product_attention is not attend
        found = [F.scaled_dot_product_attention(query, key, value, **option) for option in options]
    assert F.scaled_dot_product_attention is attend
    torch.testing.assert_close(found, wanted)


def test_tracing_is_bounded(monkeypatch):
    monkeypatch.setattr(to_onnx, "_LONGEST", 0.05)
    with pytest.raises(UserError, match="graph 'backbone': torch has traced it for"):
        with to_onnx._bounded("backbone"):
            while True:
                try:
                    sum(range(1000))
                except Exception:
                    continue
    with to_onnx._bounded("backbone"):
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tracing_is_bounded_where_the_first_exception_is_dropped(monkeypatch):
    class Drops:
        def __del__(self) -> None:
            while True:
                sum(range(1000))

    monkeypatch.setattr(to_onnx, "_LONGEST", 0.05)
    monkeypatch.setattr(to_onnx, "_AGAIN", 0.05)
    with pytest.raises(UserError, match="graph 'backbone': torch has traced it for"):
        with to_onnx._bounded("backbone"):
            Drops()
            while True:
                sum(range(1000))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.slow
def test_parallel_branches_are_merged_and_the_manifest_says_so(photo_folder, tmp_path):
    recipe = small_recipe(photo_folder, method="plain", train={"steps": 1})
    recipe["student"] = {"name": "fastvit_t8", "image_size": 64, "kwargs": SMALL}
    recipe["teachers"] = recipe["teachers"][1:2]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = run_here(tmp_path / "run", "--output", tmp_path / "bundle", command=export)
    assert done.returncode == 0, done.stderr
    assert "tracing   backbone" in done.stdout and "merging" in done.stdout
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.graph("backbone").about["merged_layers"] > 10
    assert all(row.passed and row.cosine > 0.99999 for row in manifest.parity)
    graph = onnx.load(tmp_path / "bundle" / "backbone.onnx")
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_page(monkeypatch, tmp_path):
    whole = networks.PAGE.read_text()
    header, bar, table = whole.partition("|---|---|---|---|---|---|---|\n")
    lines = table.splitlines()
    kept = [line for line in lines if not line.startswith("| pit |")]
    assert len(kept) == len(lines) - 1
    page = tmp_path / "networks.md"
    page.write_text(header + bar + "\n".join(kept) + "\n")
    monkeypatch.setattr(networks, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["networks", "--quick", "--limit", "45"])
    networks.main()
    assert page.read_text() == whole
    # results of other versions are none of this page's
    assert networks.read_page(whole.replace("of timm ", "of timm 0.")) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--quick --check levit pit inception_v3",
        long_case("--quick --check tnt vision_transformer_relpos xcit"),
        long_case("--check vision_transformer inception_v3"),
    ],
)
def test_the_page_of_networks_says_what_is_so(words, monkeypatch):
    """Refused families and small ones, the last of the cases with exports; all take an hour:
    `python -m benchmarks.networks`.
    """
    monkeypatch.setattr(sys, "argv", ["networks", *words.split()])
    with pytest.raises(SystemExit) as status:
        networks.main()
    assert not status.value.code
