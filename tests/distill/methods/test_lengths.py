"""Lengths of heads that were trained by cosine: against least squares written out, and in a run."""

import pytest
import torch
import torch.nn.functional as F
import yaml

from contract.signature import FITTED, FREE, TEACHERS
from distill.features import FeatureDims, Features, resize_map
from distill.methods.lengths import FreeHead, fit_lengths, with_lengths
from distill.methods.losses import Prediction, free_length_of_similarity
from distill.methods.standardize import FeatureStandardizer
from distill.methods.targets import FeatureNormalizer
from distill.runs import load_run
from distill.training import loop
from export.graph import build_parts, open_student, units_of
from tests.conftest import run_here, small_recipe

D = 8
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def normalizer(mode: str) -> FeatureNormalizer | FeatureStandardizer:
    """A teacher's, fitted to features far from zero and of unequal channels."""
    data = [5 + torch.randn(200, D) * torch.linspace(0.1, 3, D) for _ in range(2)]
    if mode == "running":
        result = FeatureStandardizer(FeatureDims(D, D))
        result.update(Features(data[0], data[1].view(2, 10, 10, D)), 1.0)
        return result
    result = FeatureNormalizer("teacher", FeatureDims(D, D), mode)
    for part, rows in zip((result.summary, result.patches), data, strict=True):
        if part.needs_fit:
            moments = part.moments()
            moments.add(rows)
            part.fit(moments)
    return result


@pytest.mark.parametrize("mode", ["none", "standardize", "phi-s", "layernorm", "running"])
def test_the_right_direction_of_any_length_is_brought_to_the_teachers_features(mode):
    norm = normalizer(mode)
    teacher = Features(5 + torch.randn(6, D), 5 + torch.randn(6, 4, 4, D))
    wanted = norm(teacher)
    said = Prediction(wanted.summary * 7, wanted.patches / 3, wanted.patches[:, 0, 0] / 3)
    fit_lengths(
        {"teacher": FreeHead(norm, ("token", "patches"))},
        [({"teacher": norm.restore(said)}, {"teacher": teacher})],
    )
    assert float(norm.lengths.token) == pytest.approx(1 / 7, rel=1e-4)
    assert float(norm.lengths.patches) == pytest.approx(3, rel=1e-4)
    restored = norm.restore(said)
    expected = wanted if mode == "layernorm" else teacher
    torch.testing.assert_close(restored.token, expected.summary, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restored.patches, expected.patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restored.summary, expected.patches[:, 0, 0], rtol=1e-4, atol=1e-4)


def test_a_prediction_that_points_away_keeps_its_length():
    norm = normalizer("none")
    teacher = Features(torch.ones(2, D), torch.ones(2, 2, 2, D))
    said = Prediction(-teacher.summary, torch.zeros(2, 2, 2, D), None)
    heads = {"teacher": FreeHead(norm, ("token", "patches"))}
    fit_lengths(heads, [({"teacher": said}, {"teacher": teacher})])
    lengths = norm.lengths
    assert lengths.token == lengths.patches == 1
    assert not lengths.is_fitted("token") and not lengths.is_fitted("patches")


def test_a_similarity_without_smooth_l1_leaves_every_length_free():
    assert free_length_of_similarity(0.5) == ()
    assert free_length_of_similarity(1.0) == ("token", "patches")


def test_a_run_fits_the_lengths_that_its_losses_leave_free(photo_folder, tmp_path, monkeypatch):
    """The residual is orthogonal to what is predicted: the normal equation."""
    seen = []

    def fit(recipe, dims, weights, batches, look, device):
        seen.extend((batch, look(batch)) for batch in batches())
        return fit_shipped(recipe, dims, weights, batches, look, device)

    fit_shipped = loop.fit_shipped
    monkeypatch.setattr(loop, "fit_shipped", fit)
    recipe = small_recipe(photo_folder, train={"steps": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr

    run = load_run(tmp_path / "run")
    deployment, norms = run.method.deploy(), run.method.normalizers
    labels = {teacher.role: teacher.label for teacher in run.recipe.teachers}
    fitted = {label for label, norm in norms.items() if norm.lengths.is_fitted("patches")}
    assert fitted == {labels["classification"], labels["dino"]}
    assert all(float(norm.lengths.token) == 1 for norm in norms.values())
    for label in fitted:
        inner = along = 0.0
        zero = norms[label].patches.inverse(torch.zeros(1, 1, 1, run.dims[label].patches))
        for batch, targets in seen:
            said = deployment(F.interpolate(batch.views["image"] / 255, size=64))[label].patches
            wanted = targets[label].patches
            own = resize_map(said, tuple(wanted.shape[1:3])) - zero
            inner += float((own * (wanted - zero - own)).sum())
            along += float(own.square().sum())
        assert float(norms[label].lengths.patches) != 1
        assert abs(inner) < 1e-3 * along
    parts = {part.signature.graph: part for part in build_parts(open_student(run.folder), 64, 64)}

    def meaning(label: str, kind: str) -> str:
        ports = parts[f"head_{label}"].signature.outputs
        return next(port.meaning for port in ports if port.name == f"{label}_{kind}")

    assert meaning(labels["dino"], "patches").endswith(FITTED)
    assert meaning(labels["dino"], "token").endswith(TEACHERS)
    assert meaning(labels["mae"], "patches").endswith(TEACHERS)
    # as in a run from before lengths were fitted
    older = {name: t for name, t in run.method.state_dict().items() if ".lengths." not in name}
    run.method.load_state_dict(with_lengths(older, run.method))
    head = deployment.shipped[labels["dino"]]
    assert units_of(head) == {"token": TEACHERS, "patches": FREE, "maps": TEACHERS}
