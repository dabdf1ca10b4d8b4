"""Two linear layers that reconstruct their input through k hidden units: free, and with interval bounds tight.

    error = ||X - W2 W1 X||_F^2 / ||X||_F^2,     X: d x n data, W1: k x d, W2: d x k

Free: W2 W1 is the projection on the leading k directions of X (Eckart, Young), and the error is the share of the
squared singular values beyond the k-th.

Tightness 1 (see `netassay.numerics.bounds.tightness`) asks that for every (i, j) all nonzero W2_ik W1_kj have one sign.
Without zero entries that holds if and only if W2 = diag(s) A diag(c), W1 = diag(c) B diag(t) with A, B >= 0 and signs
s, t, c: the sign matrices of all hidden units' outer products are then one matrix of rank one. Here s = t, as a
reconstruction with a positive diagonal asks, and A, B >= 0 may be 0, so that k coordinates can be copied. Other
patterns of zeros allow more; they are not searched.

Data of rank 1 or 2 lose nothing with as many hidden units: with the signs of a vector of theirs, the nonnegative
vectors of their line or plane are a cone with one or two edges, and A holds these. From rank 3 on, such a cone may have
more edges.

The search for A and B is local (L-BFGS on their square roots), from several starts with signs of their own: the first
start's are those of the leading direction of X, of others those of random combinations of the data. So its error is an
upper bound of the least one of this family.

Reference: Mao, Mueller, Fischer, Vechev. Understanding certified training with interval bound propagation. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from netassay.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Steps of L-BFGS of one start, and the relative change of the error at which it stops.
_STEPS, _STILL = 500, 1e-9
#: Singular values below this share of the largest are rounding.
_NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """first: (k, d), W1; second: (d, k), W2; error: as a share of the data's squared norm."""

    first: Tensor
    second: Tensor
    error: float


def gaussian_data(size: int, rank: int, samples: int, seed: int) -> Tensor:
    """(d, n), float64: X = F Z with F (d x rank) and Z (rank x n) standard normal."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return factors @ torch.randn(rank, samples, generator=generator, dtype=torch.float64)


def free(x: Tensor, hidden: int) -> Autoencoder:
    """The best of all: hidden units are the leading directions of x, at most as many as x has (k may come out less)."""
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    hidden = min(hidden, int((values > _NOTHING * values[0]).sum()))
    directions = left[:, :hidden]
    error = values[hidden:].square().sum() / values.square().sum()
    return Autoencoder(directions.T, directions, float(error))


def sign_structured(x: Tensor, hidden: int, starts: int, seed: int) -> Autoencoder:
    """The best found with W1 = B diag(s), W2 = diag(s) A and A, B >= 0."""
    size, generator = len(x), torch.Generator().manual_seed(seed)
    covariance = x @ x.T
    covariance = covariance / covariance.trace()
    best: Autoencoder | None = None
    for start in range(starts):
        weights = torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
        direction = torch.linalg.eigh(covariance)[1][:, -1] if start == 0 else x @ weights
        signs = torch.where(direction >= 0, 1.0, -1.0).double()
        roots = torch.rand(2, hidden, size, generator=generator, dtype=torch.float64)
        found = _descended(covariance * signs[:, None] * signs, roots)
        b, a = found[0].square(), found[1].square().T
        rest = torch.eye(size, dtype=torch.float64) - (signs[:, None] * a) @ (b * signs)
        error = float(((rest @ covariance) * rest).sum().clamp(min=0))
        if best is None or error < best.error:
            best = Autoencoder(b * signs, signs[:, None] * a, error)
    assert best is not None
    return best


def _descended(covariance: Tensor, roots: Tensor) -> Tensor:
    """Square roots of B and of A transposed, (2, k, d), at a local minimum of tr((I - A B) C (I - A B)^T)."""
    # A B of the order of the identity at the start, whatever d and k.
    roots = (roots * (roots[0].numel() ** -0.25)).requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [roots], max_iter=_STEPS, tolerance_grad=0.0, tolerance_change=_STILL, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        b, a = roots[0].square(), roots[1].square().T
        rest = torch.eye(len(covariance), dtype=torch.float64) - a @ b
        value = ((rest @ covariance) * rest).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return roots.detach()
