"""A number, and how far it may be off.

An estimate is wrong in two ways that average differently. What was drawn (probes, dequantisation,
the data themselves) spreads its value: over n samples that error falls like 1 / sqrt(n). What
was cut short (the steps of a solver) moves all values alike, and no mean takes it away. An
``Estimate`` keeps both apart, and its standard error is the root of the sum of their squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from ..ops import as_real

Number = float | Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value and its error bar, for each sample or for all: arithmetic keeps both.

    Sums and differences of two estimates take their draws for independent. Numbers, and tensors
    that broadcast, are exact. ``float(estimate)`` is the value of one; ``estimate[i]`` takes rows.

    Args:
        value: () or (B,); gradients go through it.
        spread: standard deviation of the value over what was drawn, like ``value``; NaN where a
            single draw does not tell.
        bias: bound on what no average takes away, the solver's error, >= 0, like ``value``.
        calls: evaluations of the score that a sample cost.
        method: how it was found, in words.

    >>> a = Estimate(torch.tensor([1.0, 3.0]), torch.tensor([0.3, 0.4]), torch.tensor([0.4, 0.0]))
    >>> print(2 * a[0] + 1)
    3 +- 1
    >>> print(a.mean())
    2 +- 1
    """

    value: Tensor
    spread: Tensor
    bias: Tensor
    calls: int = 0
    method: str = ""

    # numpy's numbers leave arithmetic to this class, or they would make an array of its rows.
    __array_ufunc__ = None

    @classmethod
    def of(cls, draws: Tensor, calls: int = 0, method: str = "") -> Estimate:
        """The mean of independent draws along axis 0; a single one tells no spread, which is NaN.

        >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
        2.0 +- 0.6
        """
        k, value = len(draws), draws.mean(0)
        square = (draws - value).square().sum(0)
        spread = torch.sqrt(square / (k - 1) / k) if k > 1 else torch.full_like(value, math.nan)
        return cls(value, spread, torch.zeros_like(value), calls, method)

    @classmethod
    def exact(cls, value: Tensor) -> Estimate:
        """A value that is what it is."""
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    @property
    def standard_error(self) -> Tensor:
        """sqrt(spread^2 + bias^2), like ``value``."""
        return torch.hypot(self.spread, self.bias)

    @property
    def shape(self) -> torch.Size:
        """That of the value."""
        return self.value.shape

    def interval(self, width: float = 1.96) -> tuple[Tensor, Tensor]:
        """value -+ (width spread + bias): 95 % of a normal law by default, shifted by the bias."""
        half = width * self.spread + self.bias
        return self.value - half, self.value + half

    def mean(self, fixed: bool = False) -> Estimate:
        """The mean over samples, as an estimate of that over the law of the data.

        Its spread is that of the values over sqrt(B): it counts the data and all that was drawn
        for each of them. With ``fixed`` the samples are all there is, and only what was drawn
        for them counts. The mean of one sample keeps its own error bar.
        """
        n = self.value.numel()
        if fixed or n == 1:
            spread = self.spread.square().sum().sqrt() / n
        else:
            spread = self.value.detach().std() / math.sqrt(n)
        return replace(self, value=self.value.mean(), spread=spread, bias=self.bias.mean())

    def map(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The same linear map of value, spread and bias: a reshape, a move to a device."""
        return replace(self, value=f(self.value), spread=f(self.spread), bias=f(self.bias))

    def __getitem__(self, index: object) -> Estimate:
        return self.map(lambda v: v[index])  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Estimate]:
        return (self[i] for i in range(len(self)))

    def __float__(self) -> float:
        return float(self.value)

    def __add__(self, other: Estimate | Number) -> Estimate:
        if isinstance(other, Estimate):
            return Estimate(
                self.value + other.value,
                torch.hypot(self.spread, other.spread),
                self.bias + other.bias,
                self.calls + other.calls,
                " + ".join(dict.fromkeys(m for m in (self.method, other.method) if m)),
            )
        if not isinstance(other, Real | Tensor):
            return NotImplemented
        value = self.value + other
        return replace(
            self,
            value=value,
            spread=self.spread.expand(value.shape),
            bias=self.bias.expand(value.shape),
        )

    __radd__ = __add__

    def __neg__(self) -> Estimate:
        return replace(self, value=-self.value)

    def __sub__(self, other: Estimate | Number) -> Estimate:
        return self + -other

    def __rsub__(self, other: Number) -> Estimate:
        return -self + other

    def __mul__(self, factor: Number) -> Estimate:
        if not isinstance(factor, Real | Tensor):
            return NotImplemented
        size = as_real(factor, "factor", self.value.device).abs().to(self.value.dtype)
        return replace(
            self, value=self.value * factor, spread=self.spread * size, bias=self.bias * size
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> Estimate:
        if not isinstance(divisor, Real | Tensor):
            return NotImplemented
        return self * (1 / divisor)

    def __str__(self) -> str:
        if self.value.ndim:
            shown = [str(one) for one in list(self.map(torch.flatten))[:8]]
            return f"[{', '.join(shown)}{', ...' if self.value.numel() > 8 else ''}]"
        value, error = float(self.value), float(self.standard_error)
        if not math.isfinite(error) or not math.isfinite(value):
            return f"{value:.6g} +- {error:.1g}".replace("nan", "unknown")
        # What is below the rounding of float32 is no error that matters.
        if error <= 1e-9 * abs(value):
            return f"{value:.9g} +- 0"
        # As many digits as the error bar, rounded to two, leaves: of a leading 1 .. 9 one.
        digits = max(0, 1 - math.floor(math.log10(error)))
        text = f"{error:.{digits}f}"
        if digits and text.endswith("0") and f"{error:.1g}" == f"{float(text):.1g}":
            return f"{value:.{digits - 1}f} +- {float(text):.{digits - 1}f}"
        return f"{value:.{digits}f} +- {text}"
