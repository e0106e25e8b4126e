"""A perceptron along the principal directions of its data, for tables.

Columns of a table are often nearly functions of one another: of standardised ones the covariance
C has eigenvalues from 10 down to 1e-4, and a network that sees all of them at one scale would have
to learn a score that is a hundred times as large in one direction as in another. So each direction
gets the preconditioning of Karras et al. (2022, table 1) with its own variance lambda in place of
that of all data. With w = (sigma / alpha)^2 and y = x / alpha, in the direction of lambda

    input     h y,              h^2 = 1 / (lambda + w)
    denoised  lambda / (lambda + w) y + sqrt(lambda w / (lambda + w)) G(h y, c)

where G is the perceptron: where it is 0, as it is at first, the score is that of N(0, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import check_finite, check_state
from .context import Sizes
from .mlp import MLP

FLOOR = 1e-6
"""The least variance of a direction, relative to that of all: of exact dependencies."""


class PrincipalMLP(MLP):
    """An ``MLP`` of vectors (D,) that starts as the score of a Gaussian: x (B, D), c -> F (B, D).

    F is what ``prediction="preconditioned"`` reads, the default, for data of mean 0 and deviation
    1: ``Facts.of(x, "column")`` makes them so. ``fit`` sets the directions.

    Args:
        shape, width, depth, classes, dropout, embedding, context: as in ``MLP``.

    Raises:
        ValueError: samples that are no vectors, and what ``MLP`` refuses.

    >>> sg.networks.PrincipalMLP((3,), 16, 1)(torch.zeros(8, 3), torch.zeros(8)).shape
    torch.Size([8, 3])
    """

    variances: Tensor
    directions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        classes: int | None = None,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        context: Sizes | None = None,
    ) -> None:
        super().__init__(shape, width, depth, classes, dropout, embedding, context=context)
        if len(self.shape) != 1:
            raise ValueError(f"principal directions are those of vectors (D,), got {self.shape}")
        self.config = {k: v for k, v in self.config.items() if k not in ("outputs", "head")}
        n = self.shape[0]
        self.register_buffer("variances", torch.ones(n))
        self.register_buffer("directions", torch.eye(n))

    def fit(self, z: Tensor, apart: Tensor | None = None) -> PrincipalMLP:
        """Take the principal directions of data z (N, D) of mean 0 and deviation 1; returns the
        network.

        Args:
            z: the data. apart: coordinates (n,) int64 whose covariance with the others is taken
                as 0. A category is no linear function of numbers, and a network that starts as
                one must unlearn it: on 142 rows it stops before it has.

        Raises:
            ValueError: data of another shape, fewer than two, or not finite.
        """
        check_state(z, "z")
        check_finite(z, "z")
        if tuple(z.shape[1:]) != self.shape or len(z) < 2:
            raise ValueError(f"z must be (N, {self.shape[0]}) with N >= 2, got {tuple(z.shape)}")
        c = z.detach().cpu().double().T.cov(correction=0).reshape(self.shape * 2)
        if apart is not None:
            other = torch.ones(len(c), dtype=torch.bool)
            other[apart] = False
            c = torch.where(other[:, None] == other, c, 0.0)
        values, basis = torch.linalg.eigh(c)
        self.variances.copy_(values.clamp_min(FLOOR * float(values.mean())))
        self.directions.copy_(basis)
        return self

    def compute(self, x: Tensor, c: Tensor, y: Tensor | None, **context: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        w = torch.exp(8 * c).to(x.dtype)[:, None]  # c = 1/4 log(sigma / alpha)
        v = self.variances
        share = (1 + w) / (v + w)
        z = x @ self.directions
        g = super().compute(share.sqrt() * z, c, y, **context)
        f = (v - 1) * w.sqrt() / (v + w) * z + (v * share).sqrt() * g
        return f @ self.directions.T
