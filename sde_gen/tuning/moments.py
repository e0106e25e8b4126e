"""Mean and covariance of the data, read off their score."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..moments import Moments, data_moments
from ..noise import Streams
from ..ops import full_precision
from ..scores import Score
from ..sdes import LinearSDE

LEVELS = 8
NEAR, FAR = 30.0, 300.0
"""Between which multiples of the data's mean variance the score is read."""


def informed(model: Score, x: Tensor, known: bool) -> Score:
    """The model, knowing the mean and covariance of samples x (N, *D) in the process's units.

    known: whether they are data. Then theirs are taken, with a quarter as many principal
    directions: fewer samples a direction say more of themselves than of the data. Otherwise the
    score is read at them.
    """
    moments = data_moments(x, rank=max(1, len(x) // 4)) if known else score_moments(model, x)
    return model.with_facts(replace(model.facts, moments=moments))


def score_moments(model: Score, x: Tensor) -> Moments:
    """Mean and covariance (m, C) of the data by a score, from samples x (N, *D) of them.

    Noise of variance w at y = x + sqrt(w) z is denoised, by Gaussian data of covariance C, to

        D = m + C (y - D) / w,

    which is linear in m and C, and for every w of any data's D the best linear answer; the more
    noise the nearer D comes to it. (m, C) are the least squares of that over ``LEVELS`` levels,
    each in units of its noise: exact for Gaussian data from n samples on, where as many samples
    of their own would show C to a root of 2 / n. In more than 2 N dimensions the C of the 2 N
    directions along which D moves most, and the mean variance of x in the rest.
    """
    sde, y0 = model.sde, x.flatten(1).double()
    assert isinstance(sde, LinearSDE)
    mean, n = y0.mean(0), y0.shape[1]
    total = float((y0 - mean).square().mean(0).sum())
    levels = torch.logspace(math.log10(NEAR), math.log10(FAR), LEVELS, dtype=torch.float64)
    top = float((sde.sigma(sde.T) / sde.alpha(sde.T)) ** 2)
    roots, noises, answers = [], [], []
    for i, w in enumerate((levels * max(total / n, 1e-12)).clamp(max=top).tolist()):
        t = float(sde.time_at(-math.log(w)))
        y = x + math.sqrt(w) * Streams(i).start(x)
        denoised = model.denoise(float(sde.alpha(t)) * y, torch.as_tensor(t)).flatten(1).double()
        roots.append(y0.new_full((len(x), 1), math.sqrt(w)))
        noises.append((y.flatten(1).double() - denoised) / math.sqrt(w))
        answers.append(math.sqrt(w) * (denoised - mean))
    root, noise, answer = (torch.cat(v) for v in (roots, noises, answers))
    r = len(root) // 4
    with full_precision(x.device.type):
        basis = _leading(answer, r) if n > r else torch.eye(n, dtype=y0.dtype, device=x.device)
        found = torch.linalg.lstsq(torch.cat([root, noise @ basis], 1), answer @ basis).solution
    values, vectors = torch.linalg.eigh((found[1:] + found[1:].mT) / 2)
    values = values.clamp_min(0)
    floor = max(total - float(values.sum()), 0.0) / (n - r) if n > r else 0.0
    values = torch.cat([values.new_tensor([floor]), values]).cpu()
    return Moments(values, mean + basis @ found[0], (basis @ vectors).contiguous())


def _leading(rows: Tensor, r: int) -> Tensor:
    """The r right singular vectors (n, r) of rows (N, n) with the largest values."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    values, vectors = values[-r:].clamp_min(1e-300), vectors[:, -r:]
    return torch.linalg.qr(rows.mT @ (vectors / values.sqrt())).Q
