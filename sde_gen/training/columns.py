"""The columns of samples with the means, deviations and correlations of the rows.

A network that is stopped before it knows its rows by heart misses their moments by some per cent,
and in a column with a long tail a small error of the law is a large one of its deviation. So the
samples z are moved by an affine map, the one that changes least of the law that was learned,

    z  ->  mu + R (e^M u + b),    u = R^-1 (z - mu),

with mu the mean of the samples and R R^T the covariance of their numbers. (Categories stay as they
are: their rows of M and b are 0, those of R - 1 too.) It moves a normal law by |M + M^T|^2 / 4 +
|b|^2 / 2 nats to second order, in directions of small variance as in those of large. M and b are
where

    1/2 sum (c_ij - C_ij)^2 + kappa/2 sum m_i^2 + tau/2 (|M|^2 + |b|^2)

is least: m and c the means and covariances of the moved samples, columns as a file has them, less
the means and in the deviations of the rows, and C the correlations of the rows. log |det| is tr M.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..data import Table
from ..facts import Units
from ..ops import check_count, check_kind
from ..sampling import sample
from ..scores import ScoreNetwork

TAU, KAPPA = 0.1, 10.0
FAR = 2**40
"""The number of the first sample drawn: far from those that anybody draws of the same seed."""
CHUNK = 2000


def match_columns(
    model: ScoreNetwork, table: Table, x: Tensor, n: int = 20_000, seed: int = 0
) -> ScoreNetwork:
    """The model with other units, in which the columns of its samples have the means, deviations
    and correlations of rows x (N, D): network and process are shared.

    Args:
        model: of the vectors of ``table``, with units (``Facts.of(x, "column")``). x: the rows, as
            ``table.encode`` gives them. n: the samples that it is fitted to. seed: of these.

    Raises:
        TypeError: no ``ScoreNetwork`` or no ``Table``.
        ValueError: a model without units, rows of another width, n < 2.

    >>> sg.data.write_csv("x.csv", {"height": [170.5, 181.0, 165.0]})
    >>> table, x = sg.data.read_csv("x.csv")
    >>> net = sg.networks.PrincipalMLP((1,), 8, 1)
    >>> model = sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts.of(x, "column"))
    >>> match_columns(model, table, x, 100).facts.units.mix.shape
    torch.Size([1, 1])
    """
    check_kind(model, ScoreNetwork, "model", "a ScoreNetwork")
    check_kind(table, Table, "table", "a Table")
    n, units = check_count(n, "n", 2), model.facts.units
    if units is None:
        raise ValueError("the model has no units: give it facts=Facts.of(x, 'column')")
    if x.ndim != 2 or x.shape[1] != table.width:
        raise ValueError(f"x must be (N, {table.width}), got {tuple(x.shape)}")
    drawn = sample(model, n, seed=seed, first=FAR, chunk=CHUNK).cpu().double()
    a, b = _fitted(table, units, units.encode(drawn), x)
    mix = a if units.mix is None else units.mix @ a
    moved = Units(units.decode(b[None])[0], units.scale, mix)
    return model.with_facts(replace(model.facts, units=moved))


def _fitted(table: Table, units: Units, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (D, D) and b (D,) of the map z -> A z + b."""
    at = table.places("continuous", "positive", "skewed", "integer")
    rows = table.numbers(x)
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    vary = deviation > 1e-12 * rows.abs().amax(0)  # what is constant has no correlation
    goal = _scaled(rows, mean, deviation, vary).T.cov(correction=0).reshape(2 * (int(vary.sum()),))
    mu, root = z.mean(0), _root(z, at)
    inverse = torch.linalg.inv(root)
    u = (z - mu) @ inverse.T
    free = z.new_zeros(len(at), z.shape[1] + 1, requires_grad=True)

    def moved() -> tuple[Tensor, Tensor]:
        m = z.new_zeros(z.shape[1], z.shape[1]).index_copy(0, at, free[:, :-1])
        return root @ torch.matrix_exp(m), root[:, at] @ free[:, -1]

    def loss() -> Tensor:
        a, b = moved()
        y = _scaled(table.whole(units.decode(mu + u @ a.T + b)), mean, deviation, vary)
        off = y.mean(0)
        gap = (y - off).T @ (y - off) / len(y) - goal
        cost = TAU * free.square().sum()
        return 0.5 * (gap.square().sum() + KAPPA * off.square().sum() + cost)

    best = torch.optim.LBFGS([free], max_iter=50, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        best.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    if len(at):
        with torch.enable_grad():
            best.step(closure)
    with torch.no_grad():
        a, b = moved()
        a = a @ inverse
        return a, mu + b - a @ mu


def _scaled(y: Tensor, mean: Tensor, deviation: Tensor, vary: Tensor) -> Tensor:
    return (y[:, vary] - mean[vary]) / deviation[vary]


def _root(z: Tensor, at: Tensor) -> Tensor:
    """R (D, D): a root of the covariance of the numbers, 1 for the coordinates of categories."""
    values, basis = torch.linalg.eigh(z[:, at].T.cov(correction=0).reshape(2 * (len(at),)))
    root = torch.eye(z.shape[1], dtype=z.dtype)
    floor = 1e-6 * values.mean()
    root[at[:, None], at] = basis * values.clamp_min(floor).sqrt()
    return root
