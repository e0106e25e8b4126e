"""Networks of diffusers as scores, and ours as theirs.

diffusers itself is imported only to load a folder: models and schedulers are taken for what they
do, model(x, timestep=k) and a table of noise levels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..facts import Facts
from ..ops import Time, check_callable, check_kind, match
from ..schedules import Tabulated
from ..sdes import VP, LinearSDE, RectifiedFlow
from .base import Score
from .foreign import Foreign, Index, Steps, matched, told
from .network import Prediction


class _Convention(NamedTuple):
    """What a scheduler of diffusers says: the process, what is predicted, and its step numbers."""

    sde: LinearSDE
    prediction: Prediction
    step: Index
    span: tuple[float, float]
    time: Callable[[Tensor], Tensor]


_NAMES: dict[str, Prediction] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "velocity",
    "flow_prediction": "flow",
}


def _convention(scheduler: Any, rounded: bool) -> _Convention:
    config = getattr(scheduler, "config", None)
    abar, kind = getattr(scheduler, "alphas_cumprod", None), type(scheduler).__name__
    straight = kind.startswith("FlowMatch")
    name = getattr(config, "prediction_type", "flow_prediction" if straight else None)
    if name not in _NAMES or (abar is None and name != "flow_prediction"):
        raise ValueError(
            f"{kind} with prediction_type {name!r} is not known here, which takes"
            f" {', '.join(_NAMES)}: wrap the network with from_denoiser, from_noise or"
            " from_velocity"
        )
    if name == "flow_prediction":
        n = int(config.num_train_timesteps)  # type: ignore[union-attr]
        return _Convention(
            RectifiedFlow(), "flow", _Times(n, rounded), (0.0, 1.0), lambda k: k / n
        )
    betas = _betas(torch.as_tensor(abar).double().cpu())
    sde = VP(Tabulated(betas, T=float(len(betas))))
    return _Convention(
        sde, _NAMES[name], Steps(sde, rounded), (1.0, sde.T), lambda k: (k + 1).clamp(1, sde.T)
    )


def _betas(abar: Tensor) -> Tensor:
    """Those of the products that the network was trained with, rounded to float32 as they are."""
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    return (before - abar) / before


@dataclass(frozen=True)
class _Times:
    """n t, the number that flow-matching models of diffusers take."""

    n: int
    rounded: bool

    def __call__(self, t: Tensor) -> Tensor:
        return (self.n * t).round().long() if self.rounded else self.n * t


def from_diffusers(
    model: Any, scheduler: Any = None, *, rounded: bool = False, facts: Facts | None = None
) -> Foreign:
    """A network of diffusers as a score.

    The process is the scheduler's own table, ``VP(Tabulated(betas, T=N))``: its time is the step
    number + 1, 0 the data. The betas may end at 1 (zero terminal signal). With a flow-matching
    scheduler it is ``RectifiedFlow``, whose time is diffusers' sigma.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel``, ..., called
            as model(x, timestep=k, **context); or a pipeline, or the folder of one, which is
            loaded with diffusers (safetensors only, nothing is fetched). Labels and encodings of
            prompts go by diffusers' names, ``score.given(encoder_hidden_states=shared(e))``.
        scheduler: of any sampler: only its table of noise levels and its ``prediction_type``
            (epsilon, sample, v_prediction; flow matching) are read. That of a pipeline by default.
        rounded: whole step numbers, the nearest, for networks that take no others; by default
            they are interpolated linearly in log SNR.
        facts: what is known of the data, in the units of the network; a shape that they do not
            tell is read off ``model.config``, as one of images.

    Raises:
        TypeError: neither a model nor a pipeline or folder of one. ValueError: a scheduler that
            is not known. ImportError: a folder, and no diffusers to read it. FileNotFoundError: no
            such folder.

    >>> from types import SimpleNamespace as Named
    >>> config = Named(prediction_type="epsilon", num_train_timesteps=2)
    >>> scheduler = Named(alphas_cumprod=torch.tensor([0.9, 0.5]), config=config)
    >>> sg.scores.from_diffusers(lambda x, timestep: x, scheduler).sde.T
    2.0
    """
    if isinstance(model, str | os.PathLike):
        model = _loaded(os.fspath(model))
    if scheduler is None:
        scheduler = getattr(model, "scheduler", None)
        inner = getattr(model, "unet", None) or getattr(model, "transformer", None)
        if scheduler is None or inner is None:
            raise TypeError(
                f"without a scheduler a pipeline is needed, which has one: got {type(model)}"
            )
        model = inner
    check_callable(model, "model", "model(x, timestep=k)")
    c = _convention(scheduler, rounded)
    found = told(model, facts)
    return Foreign(_FromDiffusers(model), c.sde, c.prediction, found, c.step, c.span)


def _loaded(folder: str) -> Any:
    """The pipeline in a folder."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("a folder is read by diffusers: pip install diffusers") from error
    try:
        return DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is no folder of a pipeline, and nothing is fetched: give"
            f" DiffusionPipeline.from_pretrained({folder!r}), which fetches"
        ) from error


class _FromDiffusers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, index: Tensor, **context: Any) -> Tensor:
        out = self.model(x, timestep=index, **context)
        return out if isinstance(out, Tensor) else out[0]


class Output(NamedTuple):
    """What models of diffusers return."""

    sample: Tensor


class ForDiffusers(nn.Module):
    """A score called as a model of diffusers: see ``to_diffusers``."""

    def __init__(self, score: Score, scheduler: Any) -> None:
        super().__init__()
        check_kind(score, Score, "model", "a Score")
        if not isinstance(score.sde, LinearSDE) or score.shape is None:
            raise TypeError("model must be a score that knows its linear process and data shape")
        self.score, self.convention = score, _convention(scheduler, False)
        channels, *sides = score.shape
        self.config = _Config(channels, tuple(sides), scheduler)

    @property
    def device(self) -> torch.device:
        """That of the score."""
        return self.score.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights; float32 where there are none."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def forward(
        self, sample: Tensor, timestep: Time, return_dict: bool = True, **context: Any
    ) -> Output | tuple[Tensor]:
        """What the scheduler takes of a state (B, *D) at a step number, () or (B,)."""
        sde, theirs = self.score.sde, self.convention
        assert isinstance(sde, LinearSDE)
        u = theirs.time(torch.as_tensor(timestep).double().cpu())
        t = matched(theirs.sde, u, sde)
        alpha, sigma = theirs.sde.alpha(u), theirs.sde.sigma(u)
        e = self.score.evaluate(match(sde.sigma(t) / sigma, sample) * sample, t, **context)
        z = -match(sde.sigma(t), sample) * e.score
        out = {
            "noise": lambda: z,
            "data": lambda: e.denoised,
            "velocity": lambda: match(alpha, z) * z - match(sigma, z) * e.denoised,
            "flow": lambda: z - e.denoised,
        }[theirs.prediction]()
        return Output(out) if return_dict else (out,)


class _Config:
    """What pipelines ask a model for."""

    def __init__(self, channels: int, sides: tuple[int, ...], scheduler: Any) -> None:
        self.in_channels = self.out_channels = channels
        self.sample_size = sides[0] if len(set(sides)) == 1 else sides
        self.num_train_timesteps = scheduler.config.num_train_timesteps


def to_diffusers(model: Score, scheduler: Any) -> ForDiffusers:
    """A score as a model for a scheduler or pipeline of diffusers: the way back.

    ``to_diffusers(model, scheduler)(x, k).sample`` is what the scheduler takes (its
    ``prediction_type``) of a state in the units of the process at step k, by one call of the
    score at the same ratio of noise to signal: any linear process will do, whatever its clock.
    A scheduler of the same N noise levels as a ``VP`` of our own has
    ``trained_betas=Chain(sde, grids.uniform(sde, N, end=0)).betas``.

    Raises:
        TypeError: a score that does not know its process and shape. ValueError: a scheduler that
            is not known.

    >>> from types import SimpleNamespace as Named
    >>> config = Named(prediction_type="epsilon", num_train_timesteps=2)
    >>> scheduler = Named(alphas_cumprod=torch.tensor([0.9, 0.5]), config=config)
    >>> net = sg.scores.to_diffusers(sg.Gaussian(sg.VP(), torch.zeros(2)), scheduler)
    >>> net(torch.ones(1, 2), 1).sample.shape
    torch.Size([1, 2])
    """
    return ForDiffusers(model, scheduler)
