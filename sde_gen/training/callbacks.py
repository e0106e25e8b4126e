"""What may be told of a run while it goes: to a logger, as a picture of its loss, as samples.

A callback is any function (trainer, step, loss); these are three. Each is called in every
process, at every look at the loss, and the process that speaks for all writes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import check_callable, check_count, set_number, shown
from ..sampling import sample
from ..scores import Learned, Score
from .checkpoints import write

if TYPE_CHECKING:
    from .trainer import Trainer


class Logged:
    """Passes every look on to a logger: loss, norm, rate, samples a second, validation loss.

    Args:
        log: called as ``log(values, step=step)``; so are ``wandb.log``, ``mlflow.log_metrics`` and
            the ``log`` of accelerate's trackers:
            ``Logged(TensorBoardTracker("run", "logs").log)`` writes for TensorBoard.

    >>> callback = sg.training.Logged(lambda values, step: print(step, values["loss"]))
    """

    def __init__(self, log: Callable[..., object]) -> None:
        check_callable(log, "log", "log(values, step=step)")
        self.log = log

    def __call__(self, trainer: Trainer[Any], step: int, loss: float) -> None:
        """Log what is known."""
        if trainer.is_main:
            values = trainer.look._asdict()
            del values["step"]
            self.log({k: v for k, v in values.items() if not math.isnan(v)}, step=step)


class LossPlot:
    """Draws ``loss.png`` beside the checkpoint, now and then and at the end.

    Args:
        minutes: between two drawings.

    >>> sg.training.LossPlot(minutes=0.5).minutes
    0.5
    """

    def __init__(self, minutes: float = 1.0) -> None:
        self.minutes = minutes
        set_number(self, "minutes", least=0)
        self._drawn = time.perf_counter()

    def __call__(self, trainer: Trainer[Any], step: int, loss: float) -> None:
        """Draw, if it is time; a folder that takes no picture is warned of."""
        from ..plots import loss_curve

        late = time.perf_counter() - self._drawn >= 60 * self.minutes
        if trainer.is_main and trainer.folder is not None and (late or trainer.done):
            self._drawn = time.perf_counter()
            figure = loss_curve(trainer.history, trainer.validation.losses)
            _draw(figure, trainer.folder / "loss.png")


class Drawings:
    """Draws samples of the average, now and then and at the end, into ``samples-STEP.png``.

    It is the same noise each time, with the labels in turn: one sees what becomes of a sample.

    Args:
        every: steps between two drawings (they are drawn at the first look after them).
        n: how many samples.
        steps: calls of the network for each.
        folder: where to; that of the trainer by default.
        figure: samples (n, *D) -> a figure of matplotlib; ``plots.image_grid`` by default.

    Raises:
        TypeError: when called, where the model is no ``ScoreNetwork`` of known shape.

    >>> sg.training.Drawings(every=500).every
    500
    """

    def __init__(
        self,
        every: int = 1000,
        n: int = 16,
        steps: int = 25,
        folder: str | Path | None = None,
        figure: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if figure is not None:
            check_callable(figure, "figure", "figure(x)")
        self.figure = figure
        self.every, self.n = check_count(every, "every"), check_count(n, "n")
        self.steps, self.folder = check_count(steps, "steps"), folder
        self._last = 0

    def __call__(self, trainer: Trainer[Any], step: int, loss: float) -> None:
        """Draw, if it is time."""
        if step // self.every == self._last // self.every and not trainer.done:
            return
        self._last = step
        average = trainer.average.gathered()
        folder = trainer.folder if self.folder is None else Path(self.folder)
        if not trainer.is_main or folder is None:
            return
        was = average.training
        average.eval()
        try:
            _draw(self._figure(average), folder / f"samples-{step:07d}.png")
        finally:
            average.train(was)

    def _figure(self, model: Any) -> Any:
        from ..plots import image_grid

        if not isinstance(model, Learned) or model.shape is None:
            raise TypeError(f"Drawings needs a ScoreNetwork of known shape, got {shown(model)}")
        score: Score = model
        if model.classes is not None:
            score = model.given(y=torch.arange(self.n, device=model.device) % model.classes)
        with torch.no_grad():
            x = sample(score, self.n, self.steps, seed=0).cpu()
        return image_grid(x) if self.figure is None else self.figure(x)


def _draw(figure: Any, path: Path) -> None:
    """Write a picture; that it fails is a warning, and ends no run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: figure.savefig(file, format="png"))
    except OSError as error:
        warnings.warn(f"{path} could not be drawn: {error}", stacklevel=4)
