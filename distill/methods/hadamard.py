"""Hadamard matrices, which PHI-S needs to spread variance evenly over channels."""

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """A float64 matrix [order, order] of +-1 with H H^T = order * I.

    Built from Sylvester's doubling, Paley's two constructions and their Kronecker products, which
    covers the widths of vision models (192, 384, 512, 768, 1024, 1280, 1408, 1536, 2048, …). Raises
    ValueError where none applies.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4 == 0:
        # Paley I: q + 1 for a prime q = 3 mod 4; Paley II: 2 (q + 1) for a prime q = 1 mod 4
        if is_prime(order - 1):
            return paley_one(order - 1)
        if is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
            return paley_two(order // 2 - 1)
        for factor in range(2, order // 2 + 1):
            if order % factor == 0 and has_hadamard(factor) and has_hadamard(order // factor):
                return torch.kron(hadamard(factor), hadamard(order // factor))
    raise ValueError(f"no Hadamard matrix of order {order} is known to this construction")


def has_hadamard(order: int) -> bool:
    """Whether `hadamard(order)` can be built."""
    if order in (1, 2):
        return True
    if order % 4:
        return False
    half = order // 2 - 1
    if is_prime(order - 1) or (is_prime(half) and half % 4 == 1):
        return True
    return any(
        order % f == 0 and has_hadamard(f) and has_hadamard(order // f)
        for f in range(2, order // 2 + 1)
    )


def is_prime(number: int) -> bool:
    """Trial division; orders are a few thousand at most."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def jacobsthal(prime: int) -> Tensor:
    """Q [q, q] with Q_ij = 1 where i - j is a non-zero square modulo q, -1 where it is none, 0 on
    the diagonal.
    """
    character = -torch.ones(prime, dtype=torch.float64)
    character[(torch.arange(1, prime) ** 2) % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def paley_one(prime: int) -> Tensor:
    """I + S with S skew: order q + 1, q = 3 mod 4."""
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal(prime)
    return torch.eye(prime + 1, dtype=torch.float64) + skew


def paley_two(prime: int) -> Tensor:
    """Order 2 (q + 1), q = 1 mod 4: every 0 of the symmetric conference matrix and every +-1
    becomes a 2x2 block.
    """
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, jacobsthal(prime)
    ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, ones) + torch.kron(
        torch.eye(prime + 1, dtype=torch.float64), zeros
    )
