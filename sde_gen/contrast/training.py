"""Training a rival: the library's trainer, with the rival's own loss and optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from .. import training
from ..noise import Streams
from ..ops import check_kind
from ..training import Recipe
from .base import Rival

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..training.trainer import Options

R = TypeVar("R", bound=Rival)


def train(
    rival: R,
    data: object,
    labels: Tensor | None = None,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    **options: Unpack[Options],
) -> R:
    """Train a rival; returns its average over the run, ready to sample.

    ``training.train`` with the loss and the optimiser of the rival; that has its arguments, and
    says what is raised. Its clock is ``Recipe(minutes=...)``.

    >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    >>> from sde_gen.contrast import GAN
    >>> gan = train(GAN((2,), width=16), x, recipe=Recipe(steps=5, batch=32), progress=False)
    >>> gan.sample(3, seed=0).shape
    torch.Size([3, 2])
    """
    check_kind(rival, Rival, "rival", "a rival, such as GAN((2,))")
    recipe = Recipe() if recipe is None else recipe
    options.setdefault("objective", objective)
    options.setdefault("optimizer", rival.optimizer(recipe.lr))
    return training.train(rival, data, labels, recipe, resume=resume, progress=progress, **options)


def objective(model: nn.Module, x: Tensor, y: Any, noise: Streams) -> Tensor:
    """The loss of a rival, as the trainer asks for it."""
    loss: Tensor = model(x, y, noise)
    return loss
