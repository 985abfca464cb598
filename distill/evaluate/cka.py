"""Linear centred kernel alignment (CKA) of two or more networks' features, streamed in feature
space.

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited": with X [n, d1] and
Y [n, d2] two networks' features of the same n pictures, K = X X^T and L = Y Y^T, CKA = HSIC(K, L) /
sqrt(HSIC(K, K) HSIC(L, L)). Plain HSIC overstates the similarity where n is not much larger than
the widths; the debiased value takes Song et al.'s (2012) unbiased estimator HSIC_1, as Nguyen et
al. 2021 do ("Do Wide and Deep Networks Learn the Same Things?"). That paper averages HSIC over
minibatches; here every sum over pairs of pictures is written as sums over pictures, so one pass
gives the value of the whole data set, whatever the batches.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from contract.errors import UserError

_MIN_BIASED, _MIN_DEBIASED = 2, 4
"""Fewest pictures each estimator is defined for."""

_CONSTANT = 1e-24
"""Share of the squared norm below which the variance is float64's rounding."""


class CKAMatrix:
    """CKA between every two of M networks, from batches of their features of the same pictures.

    Keeps float64 sums on the features' device: d_a x d_b numbers for every pair, plus O(d) per
    network.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: dict[str, Tensor] = {}
        self._raw_square: dict[
            str, Tensor
        ] = {}  # sum |x|^2 before the shift: the scale of rounding
        self._sum: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}  # sum |x|^2
        self._cross: dict[tuple[str, str], Tensor] = {}  # sum x y^T
        self._weighted: dict[tuple[str, str], Tensor] = {}  # sum x |y|^2, in either order
        self._squares: dict[tuple[str, str], Tensor] = {}  # sum |x|^2 |y|^2

    @property
    def names(self) -> tuple[str, ...]:
        """The networks, in the order of the matrix."""
        return tuple(self._shift)

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Add a batch: each network's features [n, d] of the same n pictures, in the same
        order.

        Raises UserError for other names or widths than before, unequal n, or values that are not
        finite.
        """
        rows = {name: torch.as_tensor(value).detach().double() for name, value in features.items()}
        self._check(rows)
        if not self._shift:
            # Both estimators ignore a shift of all features; a large common mean would cost them
            # digits.
            self._shift = {name: x.mean(dim=0) for name, x in rows.items()}
        self.count += len(next(iter(rows.values())))
        centred = {name: x - self._shift[name] for name, x in rows.items()}
        squares = {name: x.square().sum(dim=1) for name, x in centred.items()}
        for index, (a, x) in enumerate(centred.items()):
            _accumulate(self._raw_square, a, rows[a].square().sum())
            _accumulate(self._sum, a, x.sum(dim=0))
            _accumulate(self._square, a, squares[a].sum())
            for b in self.names[index:]:
                _accumulate(self._cross, (a, b), x.T @ centred[b])
                _accumulate(self._squares, (a, b), squares[a] @ squares[b])
                _accumulate(self._weighted, (a, b), x.T @ squares[b])
                if a != b:
                    _accumulate(self._weighted, (b, a), centred[b].T @ squares[a])

    def matrix(self, debiased: bool = False) -> np.ndarray:
        """CKA [M, M] of everything added; debiased values may fall a little below 0.

        Raises UserError for too few pictures (2; 4 debiased) and for features without variance,
        whose CKA is 0 / 0.
        """
        least = _MIN_DEBIASED if debiased else _MIN_BIASED
        if self.count < least:
            kind = "debiased CKA" if debiased else "CKA"
            raise UserError(f"{kind} of {self.count} pictures is undefined: use at least {least}")
        hsic = self._unbiased_hsic if debiased else self._biased_hsic
        alone = {}
        for name in self.names:
            variance = self._square[name] - self._sum[name].square().sum() / self.count
            alone[name] = hsic(name, name)
            if variance <= _CONSTANT * self._raw_square[name] or alone[
                name
            ] <= 1e-12 * self._biased_hsic(name, name):
                raise UserError(
                    f"CKA of '{name}' is undefined: its features of all {self.count} pictures are "
                    "equal (check its weights, or use other pictures)"
                )
        result = np.eye(len(self.names))
        for i, a in enumerate(self.names):
            for j, b in enumerate(self.names[i + 1 :], start=i + 1):
                result[i, j] = result[j, i] = hsic(a, b) / (alone[a] * alone[b]) ** 0.5
        return result

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        if not rows or (self._shift and tuple(rows) != self.names):
            raise UserError(
                f"CKA got features of {', '.join(rows) or 'nothing'}, expected "
                f"{', '.join(self.names) or 'some'}"
            )
        lengths = {name: len(x) for name, x in rows.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(
                f"CKA got unequal numbers of pictures ({listed}): use the same pictures for every "
                "network"
            )
        for name, x in rows.items():
            if x.ndim != 2 or (self._shift and x.shape[1] != len(self._shift[name])):
                width = len(self._shift[name]) if self._shift else "d"
                raise UserError(
                    f"CKA got features {list(x.shape)} of '{name}', expected [pictures, {width}]"
                )
            if not x.isfinite().all():
                raise UserError(
                    f"CKA got features of '{name}' that are not finite: check its weights and "
                    "precision"
                )

    def _biased_hsic(self, a: str, b: str) -> float:
        """||Xc^T Yc||_F^2, HSIC_0 up to a factor that CKA cancels."""
        centred = self._cross[a, b] - torch.outer(self._sum[a], self._sum[b]) / self.count
        return centred.square().sum().item()

    def _unbiased_hsic(self, a: str, b: str) -> float:
        """HSIC_1 (Song et al. 2012, Eq. 5) of the kernels with zeroed diagonals, K~ and L~."""
        n, sum_a, sum_b, cross = self.count, self._sum[a], self._sum[b], self._cross[a, b]
        squares = self._squares[a, b]
        trace = cross.square().sum() - squares  # tr(K~ L~)
        total_a = sum_a.square().sum() - self._square[a]  # 1' K~ 1
        total_b = sum_b.square().sum() - self._square[b]
        rows = (
            sum_a @ cross @ sum_b
            - sum_a @ self._weighted[a, b]
            - sum_b @ self._weighted[b, a]
            + squares
        )  # 1' K~ L~ 1
        value = trace + total_a * total_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows
        return (value / (n * (n - 3))).item()


class LinearCKA:
    """CKA of two networks: `cka.add(x, y)` for every batch, then `cka.value()`."""

    def __init__(self) -> None:
        self._matrix = CKAMatrix()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add features [n, d1] and [n, d2] of the same n pictures; raises UserError as
        `CKAMatrix.add` does.
        """
        self._matrix.add({"x": x, "y": y})

    def value(self, debiased: bool = False) -> float:
        """CKA of everything added; raises UserError as `CKAMatrix.matrix` does."""
        return float(self._matrix.matrix(debiased)[0, 1])


def _accumulate(sums: dict, key: object, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
