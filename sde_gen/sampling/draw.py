"""``sample``: process, grid and solver chosen well, and what the choice rests on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..moments import Moments, isotropic
from ..ops import act, as_device, check_count, check_finite, check_kind, check_number, check_state
from ..scores import Score
from ..sdes import KernelSDE, MatrixSDE
from ..solvers import Exponential, Leap, Propagator, Solver, Spectral
from .pace import Pace, kept, pace_for
from .run import Callback, as_noise, check_solver, solve


def sample(
    model: Score,
    n: int,
    steps: int = 25,
    seed: int | None = None,
    *,
    eta: float | None = None,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    first: int = 0,
    start: Tensor | None = None,
    trajectory: bool = False,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Draw n samples from a model, in the units of its data: the one call for who does not want
    to choose.

    Args:
        model: any score that knows its process and the shape of its data, exact or learned; bind
            labels first, ``model.given(y=labels)``.
        n: how many.
        steps: network calls, where the solver makes one a step; a solver that chooses its
            steps itself (``Adaptive``, ``SciPy``) goes to the end in one.
        seed: sample i is a function of the seed and i alone; None draws a seed from torch.
        eta: noise level: 0 is the probability flow, 1 the reverse-time SDE. None takes what the
            model prefers, ``model.eta``: 0 for all but posteriors and tempered scores.
        solver: by default that which the model was tuned to (``tune_solver``; eta = 0 only),
            otherwise ``default_solver(model, eta)``.
        times: by default the grid that the solver brings, otherwise ``grids.default``, with a
            last step to t = 0.
        first: draw the samples first .. first + n - 1 of the sequence that the seed stands for.
        start: the states at the first time (n, *state), in the units of the data, in place of
            draws from the prior: a noised picture to edit, the end of another run. Of a latent
            model they are normalised latents: what is noised has no picture.
        trajectory: return the data at every time, (len(times), n, *D).
        callback: is called as callback(x, t) after each step, x (n, *D) in the units of the data.
        dtype, device: of the state; the device is the model's own by default.
        progress: show a progress bar.
        chunk: this many samples at once, by the network as it was built: nothing is timed. By
            default size and layout are the network's ``pace``; where that is None and there is
            work enough, it is found by a few timed calls (``sampling.timed``), and kept. What
            sees all samples at once (a callback, a ``SciPy`` solver) gets them so.

    Returns:
        (n, *D): of a state with more than the data in it, the data.

    Raises:
        TypeError, ValueError: the model does not know its process or shape, n < 1, a dtype that
            is not floating point, and whatever ``solve`` raises (and warns of).

    >>> sg.sample(sg.Gaussian(sg.VP(), torch.zeros(2)), 8, steps=10, seed=0).shape
    torch.Size([8, 2])
    """
    sde, shape = known(model, "sample")
    n, first = check_count(n, "n"), check_count(first, "first", 0)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"dtype must be floating point, such as torch.float32, got {dtype!r}")
    eta = check_number(model.eta if eta is None else eta, "eta", least=0)
    if solver is None:
        tuned = tuned_to(model) if eta == 0 and times is None else None
        solver = default_solver(model, eta) if tuned is None else tuned
    check_solver(solver)
    if times is None:
        end = None if model.end is None else max(model.end, grids.default_end(sde))
        grid = solver.grid or partial(grids.default, data_std=model.facts.std, end=end)
        to_zero = not solver.evaluates_end
        times = grid(sde, 1 if solver.own_steps else steps, to_zero=to_zero)
    times = grids.as_times(times)
    if not float(times[0]) > float(times[-1]):
        raise ValueError(f"times must fall from the noise to the data, got {times.tolist()}")
    noise = as_noise(seed, "seed", first)
    device = as_device(model.device if device is None else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no CUDA device")
    pace = Pace(chunk)
    if chunk is None and not solver.own_steps:
        pace = pace_for(model, n, len(times) - 1)
    blank = torch.empty(n, *sde.state_shape(shape), dtype=dtype, device=device)
    if start is None:
        z = math.sqrt(model.temperature) * noise.start(blank)
        x = starting(sde, model.facts.moments, float(times[0]), z)
    else:
        x = _started(model, start, blank)

    def leave(x: Tensor) -> Tensor:
        return model.facts.decode(sde.data(x))

    with torch.no_grad(), kept(model, pace):
        x = solve(
            sde.reverse(model, eta),
            pace.lay(x),
            times,
            solver,
            noise,
            trajectory=trajectory,
            callback=None if callback is None else lambda x, t: callback(leave(x), t),
            progress=progress,
            chunk=n if callback is not None and chunk is None else pace.part(n),
        ).contiguous()
        return torch.stack([leave(y) for y in x]) if trajectory else leave(x)


def known(model: object, verb: str) -> tuple[KernelSDE, tuple[int, ...]]:
    """The process of a model and the shape of its data, in the units of the process.

    Raises:
        TypeError: it does not know them.

    >>> sde, shape = sg.sampling.known(sg.Gaussian(sg.VP(), torch.zeros(2)), "sample")
    """
    sde, shape = getattr(model, "sde", None), getattr(model, "inside", None)
    if not isinstance(sde, KernelSDE) or shape is None:
        raise TypeError(
            f"{verb} needs a score that knows its linear process (.sde) and the shape of its data"
            f" (.facts.shape); {type(model).__name__} has sde = {sde!r}, shape = {shape!r}"
        )
    return sde, shape


def enter(model: Score, x: Tensor) -> Tensor:
    """A state, or data, in the units of the process; in what a process adds to the data nothing
    changes.

    >>> sg.sampling.enter(sg.Gaussian(sg.VP(), torch.zeros(2)), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    sde, facts = model.sde, model.facts
    if isinstance(sde, MatrixSDE) and sde.added and facts.units is not None:
        return torch.cat([facts.encode(x[:, 0]).unsqueeze(1), x[:, 1:]], 1)
    return facts.encode(x)


def tuned_to(model: Score) -> Solver | None:
    """What the model was tuned to, if its weights are still those.

    >>> print(sg.sampling.tuned_to(sg.Gaussian(sg.VP(), torch.zeros(2))))
    None
    """
    tuned = model.tuned
    if tuned is None or tuned.weights in (None, model.fingerprint()):
        return tuned
    warnings.warn(
        "the model was tuned with other weights: its tuning is not used; tune it again",
        stacklevel=3,
    )
    return None


def _started(model: Score, start: Tensor, blank: Tensor) -> Tensor:
    check_state(start, "start")
    check_finite(start, "start")
    if start.shape != blank.shape:
        raise ValueError(f"start must have shape {tuple(blank.shape)}, got {tuple(start.shape)}")
    units = model.facts.units
    return (enter(model, start) if units is None or units.affine else start).to(blank)


def default_solver(model: Score, eta: float = 0.0) -> Solver:
    """The solver that ``sample`` takes, from what the model knows of its data.

    An exponential integrator that is exact for Gaussian data of the covariance that the model
    knows (``moments``), or of its standard deviation in every direction, with corrector: on the
    probability flow of order 4 with ``Spectral`` weights, from noise on as ``Leap`` starts, on an
    SDE (eta > 0) of order 2. On a matrix process ``Propagator``, of order 3 or 2.

    >>> sg.default_solver(sg.Gaussian(sg.VP(), torch.zeros(2))).corrector
    True
    """
    check_kind(model, Score, "model", "a Score")
    facts, eta = model.facts, check_number(eta, "eta", least=0)
    if isinstance(model.sde, MatrixSDE):
        return Propagator(3 if eta == 0 else 2, facts.std**2)
    reference = isotropic(facts.variance) if facts.moments is None else facts.moments
    if eta > 0:
        return Exponential(2, reference, corrector=True)
    v = facts.variance
    weights = Spectral(v, math.prod(model.inside or (1,))) if v > 0 else None
    return Leap(4, reference, corrector=True, weights=weights)


def starting(sde: KernelSDE, moments: Moments | None, t: float, z: Tensor) -> Tensor:
    """x_t from N(0, sigma^2), or from N(alpha m, alpha^2 C + sigma^2) where moments are known.

    >>> sg.sampling.starting(sg.EDM(), None, 80.0, torch.ones(1, 2))
    tensor([[80., 80.]])
    """
    if isinstance(sde, MatrixSDE):
        return act(sde.sigma(t), z)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    if moments is None:
        return sigma * z
    spread = moments.coefficient(np.sqrt(alpha**2 * moments.values.numpy() + sigma**2))
    x = moments.apply((spread,), (z,))
    if moments.mean is None:
        return x
    return x + alpha * moments.mean.to(x).reshape(x.shape[1:])
