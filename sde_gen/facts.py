"""What is known of the data, in one place: ``Facts``, fitted by one call and kept with a model.

Data come in units of their own (pixels, kelvin, dollars); a process, its score and ``solve`` work
where the data are of order one. ``Units`` is the map between the two, x = shift + scale z, for
all coordinates together, for each column of a table or for each channel of an image; a matrix may
mix the coordinates of a vector before. It is kept in float64 and lies inside the facts, so that
whoever takes a model (``sample``, ``log_prob``, ...) gives and takes data in their own units and
cannot forget a factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from .levels import centre, check_levels
from .moments import Moments, data_moments
from .ops import check_count, check_finite, check_state, set_number

__all__ = ["Facts", "Units"]

Each = Literal["all", "column", "channel"]
"""What has a shift and a scale of its own: nothing, each column (N, D), each channel (axis 1)."""


@dataclass(frozen=True, eq=False)
class Units:
    """x = shift + scale z, from the units of the process (z) to those of the data (x).

    Args:
        shift, scale: float64, of shapes that broadcast with one sample (*D); scale > 0.
        mix: float64 (D, D) for vectors (D,), x = shift + scale (mix z); None for none.

    Raises:
        ValueError: a scale that is not positive, a mix that has no inverse, or numbers that are
            not finite.

    >>> celsius = Units(torch.tensor(20.0), torch.tensor(5.0))
    >>> celsius.decode(torch.tensor([[-1.0], [2.0]])).flatten()
    tensor([15., 30.])
    """

    affine: ClassVar[bool] = True
    shift: Tensor
    scale: Tensor
    mix: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("shift", "scale", "mix"):
            if name == "mix" and self.mix is None:
                continue
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64).cpu()
            check_finite(value, name)
            object.__setattr__(self, name, value)
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale must be positive, got {self.scale.flatten().tolist()[:8]}")
        if self.mix is not None and (self.mix.ndim != 2 or len(set(self.mix.shape)) > 1):
            raise ValueError(f"mix must be a matrix (D, D), got {tuple(self.mix.shape)}")
        if not math.isfinite(self._log_mix()):
            raise ValueError("mix has no inverse")

    @classmethod
    def of(cls, x: Tensor, each: Each = "all") -> Units:
        """Mean and standard deviation of data x (N, *D); what does not vary keeps its scale.

        Raises:
            ValueError: an unknown ``each``; columns of what is no table.
        """
        if each not in get_args(Each):
            raise ValueError(f"units are for one of {get_args(Each)}, got {each!r}")
        if each == "column" and x.ndim != 2:
            raise ValueError(f"columns are those of a table (N, D), got {tuple(x.shape)}")
        if x.ndim < 2 and each != "all":
            raise ValueError(f"channels are axis 1 of (N, C, ...), got {tuple(x.shape)}")
        axes = list(range(x.ndim)) if each == "all" else [0, *range(2, x.ndim)]
        y = x.double()
        shift = y.mean(axes, keepdim=True)[0]
        scale = (y - shift).square().mean(axes, keepdim=True)[0].sqrt()
        # A constant: what rounding leaves of its spread is no scale.
        flat = scale <= 1e-12 * y.abs().amax(axes, keepdim=True)[0]
        scale = torch.where(flat, 1.0, scale)
        return cls(shift.reshape(()), scale.reshape(())) if each == "all" else cls(shift, scale)

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` unless shift and scale are of samples of this shape."""
        try:
            whole = torch.broadcast_shapes(self.shift.shape, self.scale.shape, tuple(shape))
        except RuntimeError:
            whole = torch.Size()
        if self.mix is not None and tuple(shape) != tuple(self.mix.shape[:1]):
            raise ValueError(f"a mix {tuple(self.mix.shape)} is not of samples {tuple(shape)}")
        if whole != tuple(shape):
            raise ValueError(
                f"units of shapes {tuple(self.shift.shape)} and {tuple(self.scale.shape)} are"
                f" not those of samples {tuple(shape)}"
            )

    def inside(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of z for one x of this shape: the same."""
        return tuple(shape)

    def encode(self, x: Tensor) -> Tensor:
        """z = mix^-1 (x - shift) / scale: from the data's units, in the dtype of x."""
        z = (_wide(x) - self.shift.to(_wide(x))) / self.scale.to(_wide(x))
        if self.mix is not None:
            z = torch.linalg.solve(self.mix.to(z).T, z, left=False)
        return z.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """x = shift + scale (mix z): to the data's units, in the dtype of z."""
        return (self.shift.to(_wide(z)) + self.linear(_wide(z))).to(z.dtype)

    def linear(self, z: Tensor) -> Tensor:
        """scale (mix z), dx for dz = z, in the dtype of z."""
        mixed = _wide(z) if self.mix is None else _wide(z) @ self.mix.to(_wide(z)).T
        return (self.scale.to(mixed) * mixed).to(z.dtype)

    def adjoint(self, x: Tensor) -> Tensor:
        """mix^T (scale x), the transpose of ``linear``, in the dtype of x."""
        scaled = self.scale.to(_wide(x)) * _wide(x)
        return (scaled if self.mix is None else scaled @ self.mix.to(scaled)).to(x.dtype)

    def agrees(self, other: Units) -> bool:
        """Whether both are the same map, to rounding."""
        pairs = [(self.shift, other.shift), (self.scale, other.scale)]
        if self.mix is not None and other.mix is not None:
            pairs.append((self.mix, other.mix))
        elif self.mix is not other.mix:
            return False
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-9, 0) for a, b in pairs)

    def log_volume(self, shape: Sequence[int]) -> float:
        """log |det dx/dz| for samples of this shape: sum of log scale over the coordinates, and
        log |det mix|."""
        return float(self.scale.log().expand(tuple(shape)).sum()) + self._log_mix()

    def _log_mix(self) -> float:
        return 0.0 if self.mix is None else float(torch.linalg.slogdet(self.mix).logabsdet)


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of the data. Moments and std are in the units of the process.

    Args:
        shape: *D, of one sample.
        std: standard deviation over all coordinates.
        moments: mean and covariance.
        units: the map to the units of the data; None where they are those of the process.
        classes: the names of the classes, in the order of their labels.
        levels: the number of grey levels of quantised data on [-1, 1].

    Raises:
        ValueError: a std that is not positive and finite, fewer than two levels, units of other
            shapes.

    >>> sg.Facts.of(torch.randn(100, 2), units="column").shape
    (2,)
    """

    shape: tuple[int, ...] | None = None
    std: float = 1.0
    moments: Moments | None = None
    units: Units | None = None
    classes: tuple[str, ...] | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        set_number(self, "std", above=0)
        if self.levels is not None:
            object.__setattr__(self, "levels", check_count(self.levels, "levels", 2))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            if self.units is not None:
                self.units.check(self.shape)

    @classmethod
    def of(
        cls,
        x: Tensor,
        units: Each | None = None,
        rank: int | None = None,
        classes: Sequence[str] | None = None,
        levels: int | None = None,
    ) -> Facts:
        """Fit the facts to data x (N, *D).

        Args:
            x: floating point, finite; or integers, where ``levels`` says how many there are.
            units: scale the data to mean 0 and deviation 1, all together or each column or
                channel; None leaves them as they are.
            rank: keep the covariance, with so many principal directions; None keeps none.
            classes, levels: as in ``Facts``.

        Raises:
            TypeError, ValueError: bad data, or units that do not fit them.

        >>> facts = Facts.of(torch.tensor([[0.0, 100.0], [2.0, 300.0]]), units="column")
        >>> facts.units.scale, facts.std
        (tensor([  1., 100.], dtype=torch.float64), 1.0)
        """
        if isinstance(x, Tensor) and levels is not None and not x.is_floating_point():
            if units is None and rank is None:  # of bytes, which may be many
                shape, std = tuple(x.shape[1:]), _std_of_levels(x, levels)
                return cls(shape, std or 1.0, None, None, _names(classes), levels)
            x = centre(x, levels)
        check_state(x)
        check_finite(x)
        fitted = None if units is None else Units.of(x, units)
        z = x if fitted is None else fitted.encode(x)
        std = float(z.double().std(correction=0))
        return cls(
            shape=tuple(x.shape[1:]),
            std=std if std > 0 else 1.0,
            moments=None if rank is None else data_moments(z, rank),
            units=fitted,
            classes=_names(classes),
            levels=levels,
        )

    @property
    def variance(self) -> float:
        """Mean variance over the coordinates: that of the moments, else std^2."""
        return self.std**2 if self.moments is None else self.moments.variance

    def encode(self, x: Tensor) -> Tensor:
        """Data in the units of the process."""
        return x if self.units is None else self.units.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """States of the process in the units of the data."""
        return z if self.units is None else self.units.decode(z)

    def log_volume(self, shape: Sequence[int]) -> float:
        """log |det dx/dz| for samples of this shape: what a log density in the units of the
        process loses in the data's."""
        return 0.0 if self.units is None else self.units.log_volume(shape)

    def of_another_law(self) -> Facts:
        """What still holds for a score made of this one (guided, conditioned, added to others):
        everything but the moments, which are those of this law alone."""
        return Facts(self.shape, self.std, None, self.units, self.classes, self.levels)


def _names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if classes is None else tuple(classes)


def _std_of_levels(x: Tensor, n_levels: int) -> float:
    """The standard deviation of ``centre(x, n_levels)``, by sums of integers, which are exact."""
    total = squares = 0
    for part in x.split(1024):
        k = check_levels(part, n_levels)[0].long()
        total, squares = total + int(k.sum()), squares + int(k.square().sum())
    n = max(1, x.numel())
    return 2 / n_levels * math.sqrt((squares * n - total * total) / n**2)


def facts_of(score: object) -> Facts:
    """The facts that a score function has; none, where it is a plain function."""
    facts: Facts = getattr(score, "facts", Facts())
    return facts


def _wide(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()
