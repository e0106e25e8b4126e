"""The divergence of the score: exact, or from a few products with random signs.

For random signs e the quadratic form e . J e has mean tr J (Hutchinson 1990). Probes that are
orthogonal to one another share their errors: rows of a Hadamard matrix H of size N, a power of
two >= n, with random signs on its columns. Over all N rows sum_k e_k e_k^T = N, so their mean is
the trace whatever J is, and K rows drawn without replacement are a sample from a population of
N numbers whose mean is sought. Hence the exact variance of their mean, given the signs,

    var = s^2 / K (1 - K / N),        s^2 that of the N forms,

of which the K forms seen give an unbiased estimate (Cochran 1977, theorem 2.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import Streams
from ..ops import sum_rest

Pull = Callable[[Tensor], tuple[Tensor, ...]]
"""u (B, *D) -> (J^T u,), a product with the Jacobian's rows."""

_BUDGET = 1 << 16
"""Numbers of the state that are differentiated at once: more gain no time, and take memory."""


def hadamard_size(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


def orthogonal_signs(x: Tensor, probes: int, streams: Streams) -> Tensor:
    """Probes (K, B, *D) of -1 and 1 like x (B, *D): a function of the streams' numbers.

    Rows of Hadamard's matrix, H_ij = (-1)^(ones in i & j), drawn without replacement for each
    sample, with a random sign on each column.
    """
    n = x[0].numel()
    size = hadamard_size(n)
    blank = x.new_empty(len(x), size, dtype=torch.float64 if x.device.type != "mps" else None)
    rows = streams.uniform(blank, "probes: rows").argsort(1)[:, :probes]
    column = torch.where(streams.uniform(blank[:, :n], "probes: signs") < 0.5, -1, 1)
    bits = rows.T.unsqueeze(-1) & torch.arange(n, device=x.device)
    odd = torch.zeros_like(bits)
    while bool((bits > 0).any()):
        odd, bits = odd ^ (bits & 1), bits >> 1
    return ((1 - 2 * odd) * column).to(x.dtype).reshape(-1, *x.shape)


def trace(pull: Pull, state: Tensor) -> Tensor:
    """tr J for each sample, (B,): row i of the Jacobian for the unit vector i."""
    n = state[0].numel()
    index = torch.arange(n, device=state.device)

    def entry(i: Tensor) -> Tensor:
        e = (index == i).to(state.dtype).reshape(1, *state.shape[1:]).expand_as(state)
        return sum_rest(pull(e)[0] * e)

    size = max(1, _BUDGET // state.numel())
    return torch.func.vmap(entry, chunk_size=size)(index).sum(0)


def forms(pull: Pull, signs: Tensor, dtype: torch.dtype) -> Tensor:
    """e_k . J e_k for the probes (K, B, *D): (B, K)."""
    size = max(1, _BUDGET // signs[0].numel())
    rows = torch.func.vmap(lambda e: sum_rest(pull(e)[0] * e), chunk_size=size)(signs.to(dtype))
    return rows.T


def spread_of(parts: Tensor, n: int) -> Tensor:
    """Standard error (B,) of the mean over K orthogonal probes (B, K) in n coordinates.

    NaN for a single one, which does not tell how the others would differ.
    """
    k, size = parts.shape[1], hadamard_size(n)
    if k == 1 and size > 1:
        return parts.new_full((len(parts),), torch.nan)
    left = 1 - k / size
    return parts.var(1).mul(left / k).sqrt() if left > 0 else parts.new_zeros(len(parts))
