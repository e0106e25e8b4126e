"""A dequantiser that is trained: a logistic law on each cell, told by all levels of the sample.

    u = sigmoid(m(k) + s(k) logit v),   v uniform on [0, 1],
    log q(u | k) = sum log dv/du = sum [log v (1 - v) - log s - log u (1 - u)],

m and log s being 0 at first: that is uniform. The bound E_q [log p(x(u)) - log q(u | k)] (Ho et
al. 2019) rises along

    grad log p(x) . dx - d log q,

in which the gradient of a fixed model's log density is its score where its flow starts: one call a
step, and no flow is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..levels import centre, check_levels, place
from ..noise import Streams
from ..ops import check_count, check_number, sum_rest
from ..sampling import enter
from ..scores import Score
from ..sdes import LinearSDE
from .flow import check_model, flow_grid


class LogisticDequantiser(nn.Module):
    """q(u | k), for ``bits_per_dim(dequantiser=)``: m and log s of each coordinate are a table of
    its own level plus a perceptron of all levels.

    Args:
        shape: of one sample, without the batch.
        n_levels: L.
        width: of the hidden layer.

    >>> q = LogisticDequantiser((2,), 4)
    >>> u, log_q = q(torch.tensor([[0, 3]]), torch.tensor([[0.25, 0.5]]))
    >>> u, log_q
    (tensor([[0.2500, 0.5000]]), tensor([0.]))
    """

    def __init__(self, shape: Sequence[int], n_levels: int, width: int = 64) -> None:
        super().__init__()
        self.n_levels = check_count(n_levels, "n_levels", 2)
        n = math.prod(check_count(size, "each of shape") for size in shape)
        width = check_count(width, "width")
        self.table = nn.Parameter(torch.zeros(n, self.n_levels, 2))
        self.all = nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, 2 * n))
        for v in self.all[2].parameters():
            nn.init.zeros_(v)
        self.requires_grad_(False)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and uniform numbers (B, *shape) -> u like them, log q (B,)."""
        flat, v = k.flatten(1), v.flatten(1).to(self.table).clamp(1e-6, 1 - 1e-6)
        own = self.table[torch.arange(flat.shape[1], device=k.device), flat]
        m, log_s = (
            own + self.all(centre(flat, self.n_levels).to(self.table)).reshape(own.shape)
        ).unbind(-1)
        a = m + log_s.exp() * torch.logit(v)
        log_q = torch.log(v) + torch.log1p(-v) - log_s - logsigmoid(a) - logsigmoid(-a)
        return torch.sigmoid(a).reshape(k.shape), log_q.sum(1)

    def fit(
        self,
        model: Score,
        levels: Tensor | ArrayLike,
        steps: int = 500,
        batch: int = 128,
        lr: float = 0.02,
        seed: int = 0,
    ) -> LogisticDequantiser:
        """Raise the bound of a fixed model of a linear process, of data on [-1, 1]; self.

        Args:
            model: labels bound to these levels, if it takes any.
            levels: (N, *shape), what the bound is trained on: not what it is reported on.
            steps, batch, lr: of Adam, the rate falling to 0 along a cosine.

        Raises:
            TypeError, ValueError: bad levels, numbers out of range, no ``LinearSDE``.
        """
        k, _ = check_levels(levels, self.n_levels)
        sde = check_model(model, centre(k, self.n_levels).to(self.table))
        if not isinstance(sde, LinearSDE):
            raise TypeError(f"fit needs a score of a LinearSDE, got one of {sde!r}")
        t = float(flow_grid(sde, model, None)[0])
        steps, streams = check_count(steps, "steps"), Streams(seed)
        adam = torch.optim.Adam(self.requires_grad_(True).parameters(), check_number(lr, "lr"))
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        with torch.enable_grad():
            for i in range(steps):
                rows = streams.uniform(self.table.new_empty(len(k)), f"rows {i}").argsort()[:batch]
                part = k[rows.to(k.device)]
                v = streams.uniform(self.table.new_empty(part.shape), f"cells {i}")
                u, log_q = self(part, v)
                x = float(sde.alpha(t)) * enter(model, place(part, u, self.n_levels))
                with torch.no_grad():
                    score = model.rows(rows).evaluate(x, t).score
                adam.zero_grad()
                (log_q - sum_rest(score.to(x) * x)).mean().backward()
                adam.step()
                fall.step()
        return self.requires_grad_(False)
