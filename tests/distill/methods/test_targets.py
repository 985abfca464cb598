"""Target normalisation against direct numpy computations and its defining properties."""

import numpy as np
import pytest
import torch

from contract.errors import UserError
from distill.features import FeatureDims, Features
from distill.methods.hadamard import hadamard, has_hadamard
from distill.methods.losses import Prediction
from distill.methods.targets import FeatureNormalizer, Moments, TargetNormalizer, fit_normalizers

WIDTHS = [
    64,
    96,
    128,
    192,
    256,
    320,
    384,
    512,
    576,
    640,
    768,
    1024,
    1152,
    1280,
    1408,
    1536,
    1664,
    2048,
]


def data(rows: int = 500, width: int = 24) -> torch.Tensor:
    """Correlated channels of very different scale, off centre."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-2, 2, width)
    return torch.randn(rows, width, generator=generator) @ mixing + 5


def even(rows: int = 500, width: int = 24) -> torch.Tensor:
    """Channels whose deviations lie within a factor of ten."""
    return torch.randn(rows, width) * torch.logspace(-1, 0, width) * 7 + 5


def fitted(mode: str, x: torch.Tensor) -> TargetNormalizer:
    normalizer = TargetNormalizer(x.shape[-1], mode)
    moments = normalizer.moments()
    moments.add(x)
    normalizer.fit(moments)
    return normalizer


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, *WIDTHS])
def test_hadamard_matrices_have_unit_entries_and_orthogonal_rows(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order) and torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_hadamard_matrix_are_refused():
    assert not has_hadamard(6) and not has_hadamard(50)
    with pytest.raises(ValueError, match="order 50"):
        hadamard(50)


def test_streamed_moments_equal_numpys_on_all_rows():
    x = data()
    moments = Moments(24, full=True)
    for part in x.split([100, 1, 399]):
        moments.add(part.view(-1, 1, 24))
    np.testing.assert_allclose(moments.mean(), x.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        moments.covariance(), np.cov(x.double().numpy().T, bias=True), rtol=1e-6, atol=1e-6
    )


def test_standardize_gives_every_channel_mean_zero_and_deviation_one():
    x = even()
    y = fitted("standardize", x)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(24), atol=1e-4, rtol=0)


def test_phi_s_gives_every_channel_the_same_variance_and_scales_all_distances_alike():
    x = data()
    y = fitted("phi-s", x)(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(24), atol=1e-3, rtol=0)
    ratios = torch.pdist(y[:50].double()) / torch.pdist(x[:50].double())
    assert ratios.std() / ratios.mean() < 1e-4


@pytest.mark.parametrize("mode", ["standardize", "phi-s", "none"])
def test_predictions_come_back_in_the_teachers_units(mode):
    x = data()
    normalizer = fitted(mode, x) if mode != "none" else TargetNormalizer(24, "none")
    torch.testing.assert_close(normalizer.inverse(normalizer(x)), x, rtol=1e-3, atol=1e-2)


def test_a_channel_that_slept_during_estimation_does_not_explode_later():
    x = even()
    x[:, 3] = 0.0
    normalizer = fitted("standardize", x)
    awake = x.clone()
    awake[:, 3] = x.std()
    assert normalizer(awake)[:, 3].abs().max() < 30


def test_layernorm_needs_no_statistics():
    x = data()
    torch.testing.assert_close(
        TargetNormalizer(24, "layernorm")(x).std(1, correction=0), torch.ones(500)
    )


def test_a_constant_channel_stays_finite():
    x = data()
    x[:, 3] = 7.0
    for mode in ("standardize", "phi-s"):
        assert torch.isfinite(fitted(mode, x)(x)).all()


def test_statistics_are_part_of_the_state_and_make_predictions_whole_again():
    x = data(64).view(16, 2, 2, 24)
    features = Features(x[:, 0, 0], x)
    modules = torch.nn.ModuleDict({"t": FeatureNormalizer("t", FeatureDims(24, 24), "phi-s")})
    fit_normalizers(modules, [features, features], lambda batch: {"t": batch}, torch.device("cpu"))
    copy = FeatureNormalizer("t", FeatureDims(24, 24), "phi-s")
    copy.load_state_dict(modules["t"].state_dict())
    normal = copy(features)
    back = copy.restore(Prediction(normal.summary, normal.patches, normal.patches.mean((1, 2))))
    torch.testing.assert_close(back.patches, features.patches, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(back.token, features.summary, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(back.summary, features.patches.mean((1, 2)), rtol=1e-3, atol=1e-2)


def test_phi_s_on_a_width_without_a_hadamard_matrix_names_the_teacher():
    with pytest.raises(UserError, match="teacher 'odd'.*width 50.*standardize"):
        FeatureNormalizer("odd", FeatureDims(50, 64), "phi-s")
