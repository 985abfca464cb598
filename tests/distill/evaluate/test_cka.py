"""Streamed CKA against its definitions with explicit n x n matrices."""

import numpy as np
import pytest
import torch

from contract.errors import UserError
from distill.evaluate.cka import CKAMatrix, LinearCKA


def random_features(n: int, d1: int, d2: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d1, generator=generator, dtype=torch.float64) + 3
    return x, x[:, : min(d1, d2)] @ torch.randn(
        min(d1, d2), d2, generator=generator, dtype=torch.float64
    ) + torch.randn(n, d2, generator=generator, dtype=torch.float64)


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return torch.trace(k @ centre @ m @ centre)

    k, m = x @ x.T, y @ y.T
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def gram_debiased(x: torch.Tensor, y: torch.Tensor) -> float:
    n = len(x)
    ones = torch.ones(n, dtype=torch.float64)

    def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        k, m = k - torch.diag(torch.diag(k)), m - torch.diag(torch.diag(m))
        whole = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (torch.trace(k @ m) + whole - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


def streamed(
    x: torch.Tensor, y: torch.Tensor, sizes: list[int] | int, debiased: bool = False
) -> float:
    cka = LinearCKA()
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        cka.add(a, b)
    return cka.value(debiased)


@pytest.mark.parametrize("sizes", [50, 7, 1, [3, 40, 7]])
@pytest.mark.parametrize(("d1", "d2"), [(5, 9), (80, 3)])
def test_any_batches_give_the_definitions(sizes: list[int] | int, d1: int, d2: int) -> None:
    x, y = random_features(50, d1, d2)
    assert streamed(x, y, sizes) == pytest.approx(gram_cka(x, y), abs=1e-12)
    assert streamed(x, y, sizes, debiased=True) == pytest.approx(gram_debiased(x, y), abs=1e-11)


@pytest.mark.parametrize("debiased", [False, True])
def test_invariances(debiased: bool) -> None:
    x, y = random_features(60, 8, 6)
    rotation = torch.linalg.qr(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    value = streamed(x, y, 16, debiased)
    assert 0.1 < value < 0.99
    assert streamed(x @ rotation * 250 + 1000, y, 16, debiased) == pytest.approx(value, abs=1e-8)
    assert streamed(y, x, 16, debiased) == pytest.approx(value, abs=1e-12)
    assert streamed(x, x @ rotation * 0.01, 16, debiased) == pytest.approx(1, abs=1e-10)


def test_a_large_mean_costs_few_digits() -> None:
    x, y = random_features(60, 8, 6)
    value = streamed(x, y, 20, debiased=True)
    assert streamed(x + 1e5, y - 1e5, 20, debiased=True) == pytest.approx(value, abs=1e-7)


def test_debiased_sees_that_features_are_independent() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 400, generator=generator), torch.randn(40, 300, generator=generator)
    assert streamed(x, y, 10) > 0.8
    assert abs(streamed(x, y, 10, debiased=True)) < 0.1


def test_matrix_holds_every_pair() -> None:
    x, y = random_features(30, 6, 4)
    z = x.flip(0)
    cka = CKAMatrix()
    for rows in torch.arange(30).split(8):
        cka.add({"dino": x[rows], "clip": y[rows].float(), "sam": z[rows].numpy()})
    assert cka.names == ("dino", "clip", "sam") and cka.count == 30
    for debiased, definition in ((False, gram_cka), (True, gram_debiased)):
        found = cka.matrix(debiased)
        expected = [[definition(a, b) for b in (x, y, z)] for a in (x, y, z)]
        np.testing.assert_allclose(found, expected, atol=1e-6)  # clip went through float32
        np.testing.assert_array_equal(found, found.T)


def test_too_few_pictures() -> None:
    x, y = random_features(3, 5, 5)
    assert 0 < streamed(x, y, 3) <= 1
    with pytest.raises(UserError, match="debiased CKA of 3 pictures is undefined: use at least 4"):
        streamed(x, y, 3, debiased=True)
    with pytest.raises(UserError, match="CKA of 0 pictures"):
        LinearCKA().value()


@pytest.mark.parametrize("debiased", [False, True])
def test_constant_features_are_named(debiased: bool) -> None:
    x, _ = random_features(20, 5, 5)
    with pytest.raises(
        UserError, match="CKA of 'y' is undefined: its features of all 20 pictures are equal"
    ):
        streamed(x, torch.full((20, 7), 0.1), 6, debiased)


def test_wrong_batches_are_refused_and_leave_no_trace() -> None:
    x, y = random_features(10, 5, 4)
    cka = LinearCKA()
    cka.add(x, y)
    value = cka.value()
    with pytest.raises(UserError, match="unequal numbers of pictures"):
        cka.add(x, y[:5])
    with pytest.raises(UserError, match=r"features \[10, 4\] of 'x', expected \[pictures, 5\]"):
        cka.add(y, y)
    with pytest.raises(UserError, match="of 'y' that are not finite"):
        cka.add(x, y / 0)
    assert cka.value() == value
    matrix = CKAMatrix()
    matrix.add({"a": x, "b": y})
    with pytest.raises(UserError, match="CKA got features of a, expected a, b"):
        matrix.add({"a": x})
