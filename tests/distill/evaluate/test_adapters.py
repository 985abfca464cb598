"""A student that is more than its timm network: what reads or trains the network alone is refused,
or reads it inside its adapter.
"""

from pathlib import Path

import pytest
import torch

from distill.config import TeacherConfig
from distill.evaluate import depth, finetune
from distill.evaluate.attention import last_block
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder, RunEncoder, TeacherEncoder
from distill.evaluate.outcome import NotApplicable
from distill.recipe_io import make_recipe
from distill.runs import Run, save_student
from distill.teachers import TeacherRuntime, build_teacher
from tests.distill.methods.test_kpu import DIMS, draw, kpu_recipe, small_method


@pytest.fixture(scope="module", params=["run", "teacher"])
def encoder(request, tmp_path_factory) -> Encoder:
    """A student of KPU whose adapter changes what its sentinel says, in both its places."""
    method, dims = small_method({"clip": DIMS["clip"]}), {"clip": DIMS["clip"]}
    method(*draw(method))
    values = kpu_recipe(Path("photos"))
    values["teachers"] = values["teachers"][:1]
    recipe = make_recipe(values)
    folder = tmp_path_factory.mktemp("kpu")
    if request.param == "run":
        return RunEncoder(Run(folder, recipe, dims, method.eval(), None, "0" * 64), "backbone")
    save_student(folder, method.state_dict(), method, recipe, dims, 1)
    config = TeacherConfig(name="run", role="classification", checkpoint=str(folder))
    return TeacherEncoder(build_teacher(config, TeacherRuntime(), 0), "teacher")


def test_finetuning_refuses_an_adapter(encoder, tmp_path):
    words = "not one inside an adapter, a detector's backbone, or a network"
    with pytest.raises(NotApplicable, match=words):
        finetune.evaluate(encoder, tmp_path, EvaluationConfig(), tmp_path)
    (tmp_path / "finetuned.safetensors").touch()
    with pytest.raises(NotApplicable, match="set robustness.classifier=probe"):
        finetune.finetuned_classifier(encoder, tmp_path / "finetuned.safetensors")
    config = EvaluationConfig.model_validate({"depth": {"head": "dpt", "backbone_lr": 0.1}})
    with pytest.raises(NotApplicable, match="set depth.backbone_lr=0"):
        depth.evaluate(encoder, tmp_path, config, tmp_path, tmp_path, {})


def test_attention_is_that_inside_the_adapter(encoder):
    images = torch.randint(0, 256, (2, 3, 56, 70), dtype=torch.uint8)
    attention, tokens = last_block(encoder, images)
    assert attention.shape == (2, 2, 21, 21)
    torch.testing.assert_close(tokens[:, 1:], encoder(images).patches.flatten(1, 2))
    with torch.no_grad():
        alone = encoder.net.forward_features(encoder.normalize(images))
    assert not torch.allclose(tokens, alone, atol=1e-3)
