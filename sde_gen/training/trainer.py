"""Training: Adam on a loss, an average of the weights, a clock, and a way back from a crash.

Work goes in windows of ``every`` steps. Within a window nothing waits for the device. At its end
the losses are read, NaN is looked for, the average is updated, the bar moves. Each window draws
from generators seeded by (seed, process, step), so a run that was stopped and resumed does
exactly what it would have done, and the global generators are left as they were.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..ops import batch_of, check_finite, check_state, check_tensor
from ..scores import ScoreNetwork
from .checkpoints import CONFIG, WEIGHTS, CheckpointError, describe, save, write
from .devices import accelerator, pick_device
from .losses import Denoising, Objective
from .recipe import Recipe, learning_rate, power_of_width
from .rows import remember

STATE = "training.pt"
Transform = Callable[[Tensor, torch.Generator], Tensor]
"""(x (B, *D), generator) -> (B, *D): dequantisation, augmentation; redrawn for every batch."""

M = TypeVar("M", bound=nn.Module)


class TrainingError(RuntimeError):
    """Training cannot go on. ``step`` says where; the model has its last good weights."""

    def __init__(self, step: int, reason: str, kept: int) -> None:
        super().__init__(
            f"training stopped at step {step}: {reason}; the model has the weights of step {kept}"
        )
        self.step, self.kept = step, kept


class Trainer(Generic[M]):
    """Trains ``model`` in place; ``average`` holds the averaged copy that ``run`` returns.

    Args:
        model: a ``ScoreNetwork``, or any module that ``objective`` knows.
        data: (N, *D), floating point, or what ``transform`` makes such; it is moved to the device.
        labels: (N,) int64, for a conditional model.
        recipe: how long, how fast, how smoothly.
        objective: the loss; ``Denoising()`` by default.
        transform: applied to every batch.
        device: the fastest there is, by default.
        folder: where checkpoints go, of the average and of the state of the run.

    Under a launcher of several processes (``accelerate launch``) each takes its part of the batch.

    Raises:
        TypeError, ValueError: data that are integers, NaN, infinite or of the wrong shape, labels
            missing or out of range, a model that cannot be saved: before anything is done.
        RuntimeError: a device that is not there.
    """

    def __init__(
        self,
        model: M,
        data: Tensor,
        labels: Tensor | None = None,
        recipe: Recipe | None = None,
        *,
        objective: Objective | None = None,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.recipe = recipe = recipe or Recipe()
        self.accelerator = accelerator()
        self.device = self.accelerator.device if self.accelerator else pick_device(device)
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        if recipe.batch % self.processes:
            raise ValueError(f"batch {recipe.batch} does not divide by {self.processes} processes")
        check_data(model, data, labels, transform)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and isinstance(model, ScoreNetwork):
            describe(model)
        self.model = model.to(self.device)
        self.data = data.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.objective, self.transform = objective or Denoising(), transform
        self.average = AveragedModel(model, multi_avg_fn=self._average)
        self.optimizer = torch.optim.Adam(
            model.parameters(), recipe.lr, (0.9, 0.99), fused=self.device.type in ("cpu", "cuda")
        )
        self.step, self.elapsed = 0, 0.0
        self.history: list[tuple[int, float]] = []
        self._power = power_of_width(recipe.ema) + 1
        self._measured = 0
        self._good: tuple[int, list[dict[str, Tensor]]] = (0, [])

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.accelerator is None or self.accelerator.is_main_process

    def run(self, progress: bool = True) -> M:
        """Train to the end of the budget; returns the averaged model, in evaluation mode.

        Args:
            progress: show a bar with the loss.

        Raises:
            TrainingError: a loss or gradient is not finite, or the objective raised.
        """
        wrapped = self.accelerator.prepare_model(self.model) if self.accelerator else self.model
        saved = time.perf_counter()
        if self.folder is not None and self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remember(self.data, self.folder)
        with self._bar(progress) as bar, _forked(self.device):
            self.model.train()
            self._keep()
            while self._progress() < 1:
                loss = self._window(wrapped)
                self.average.update_parameters(self.model)
                self._keep()
                self.history.append((self.step, loss))
                bar.set_postfix_str(f"loss {loss:.4f}, step {self.step}", refresh=False)
                bar.update(round(100 * self._progress(), 1) - bar.n)
                if time.perf_counter() - saved > 60 * self.recipe.save_every:
                    self.save()
                    saved = time.perf_counter()
        self.model.eval()
        self.save()
        return cast(M, self.average.module.eval())

    def save(self) -> None:
        """Write the averaged model and the state of the run, where there is a folder."""
        if self.folder is None or not self.is_main:
            return
        self._save_average(self.folder)
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write(self.folder / STATE, lambda file: torch.save(state, file))

    def resume(self) -> None:
        """Take up the run that the folder holds, exactly where its last checkpoint left it.

        Raises:
            CheckpointError: no folder, no state in it, or one that is unreadable or of another
                model; nothing has then been changed, unless the state fits only in part.
        """
        file = (self.folder or Path()) / STATE
        if self.folder is None or not file.is_file():
            raise CheckpointError(f"no run to resume: {file} is missing")
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} is truncated or cannot be read: {error}") from error
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = self._measured = int(state["step"])
            self.elapsed = float(state["elapsed"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} is not of this model: {error}") from error

    def _window(self, model: nn.Module) -> float:
        """Take up to ``every`` steps; returns their mean loss."""
        start, clock = self.step, time.perf_counter()
        generator = self._generator()
        budget = self.recipe.steps or math.inf
        reports: list[Tensor] = []
        while len(reports) < min(self.recipe.every, budget - start):
            try:
                reports.append(self._step(model, generator))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise self._failure(self.step, f"{type(error).__name__}: {error}") from error
            self.step += 1
        losses, norms = self._mean(torch.stack(reports, 1)).tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss):
                raise self._failure(start + i, f"the loss is {loss}")
            if not math.isfinite(norm):
                raise self._failure(start + i, f"the gradient's norm is {norm}")
        seconds = torch.tensor(time.perf_counter() - clock, device=self.device)
        self.elapsed, self._measured = self.elapsed + float(self._mean(seconds)), self.step
        return sum(losses) / len(losses)

    def _step(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """One step; returns loss and gradient norm, on the device, without waiting for them."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * learning_rate(self._progress(0.5), self.recipe.warmup)
        n = self.recipe.batch // self.processes
        rows = torch.randint(len(self.data), (n,), generator=generator, device=self.device)
        x = self.data[rows]
        x = x if self.transform is None else self.transform(x, generator)
        y = None if self.labels is None else self.labels[rows]
        half = self.recipe.autocast and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = self.objective(model, x, y, generator).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss.detach().float(), norm.float()])

    def _progress(self, ahead: float = 0.0) -> float:
        """The part of the budget used ``ahead`` steps from here, in [0, 1]."""
        steps, minutes, step = self.recipe.steps, self.recipe.minutes, self.step + ahead
        parts = [step / steps] if steps else []
        if minutes:
            # Between two looks at the clock time goes on at the mean rate so far.
            rate = step / self._measured if self._measured else 1.0
            parts.append(self.elapsed * rate / (60 * minutes))
        return min(1.0, max(parts))

    def _generator(self) -> torch.Generator:
        """The generator of the window that starts here; dropout's, the global one, is seeded."""
        rank = self.accelerator.process_index if self.accelerator else 0
        name = f"{self.recipe.seed}, {rank}, {self.step}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[_index(self.device)].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, so that all decide alike."""
        return self.accelerator.reduce(values, "mean") if self.accelerator else values

    def _average(self, mean: Any, new: Any, _: Any) -> None:
        # The counter stands on the host: reading the copy on the device would wait for it.
        k = int(self.average.n_averaged) + 1
        torch._foreach_lerp_(mean, new, 1 - (1 - 1 / k) ** self._power)

    def _keep(self) -> None:
        """Remember the weights as good."""
        states = (self.model.state_dict(), self.average.state_dict())
        self._good = (self.step, [{k: v.clone() for k, v in s.items()} for s in states])

    def _failure(self, step: int, reason: str) -> TrainingError:
        """Go back to the last good weights, write them, and say what happened."""
        self.step, (model, average) = self._good
        self.model.load_state_dict(model)
        self.average.load_state_dict(average)
        if self.folder is not None and self.is_main:
            self._save_average(self.folder)
        return TrainingError(step, reason, self.step)

    def _save_average(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.average.module, ScoreNetwork):
            save(self.average.module, folder)

    def _bar(self, show: bool) -> Any:
        hide = not (show and self.is_main)
        if hide:  # tqdm.auto looks for a notebook and may warn that it found none
            from tqdm import tqdm
        else:
            from tqdm.auto import tqdm

        form = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=100, desc="training", bar_format=form, disable=hide, leave=True)


def train(
    model: M,
    data: Tensor,
    labels: Tensor | None = None,
    recipe: Recipe | None = None,
    *,
    objective: Objective | None = None,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> M:
    """Train a model; returns its average over the run, ready to sample. See ``Trainer``.

    Args:
        resume: take up the run in ``folder`` where it stopped, if it holds one.
        overwrite: begin anew, whatever run or model ``folder`` holds.
        progress: show a bar with the loss.

    >>> from sde_gen import VP, ScoreNetwork
    >>> from sde_gen.networks import MLP
    >>> data = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> recipe = Recipe(steps=20, batch=64)
    >>> model = train(ScoreNetwork(MLP((2,)), VP()), data, recipe=recipe, progress=False)
    >>> model(data[:4], 0.5).shape
    torch.Size([4, 2])
    """
    held = [name for name in (STATE, WEIGHTS, CONFIG) if (Path(folder or "") / name).exists()]
    if folder is not None and held and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} already holds {', '.join(held)}: ask to resume that run or to overwrite it"
        )
    trainer = Trainer(
        model,
        data,
        labels,
        recipe,
        objective=objective,
        transform=transform,
        device=device,
        folder=folder,
    )
    if resume and trainer.folder is not None and (trainer.folder / STATE).exists():
        trainer.resume()
    return trainer.run(progress)


def check_data(
    model: nn.Module, data: Tensor, labels: Tensor | None, transform: Transform | None = None
) -> None:
    """Raise unless data and labels are what the model can be trained on.

    Raises:
        TypeError: data that are no tensor or, without a transform, integers; labels not int64.
        ValueError: no data, NaN or infinity, a shape that is not the model's; labels missing, not
            wanted, of another number than the data, or out of range.
    """
    check_tensor(data, "data")
    if data.ndim < 1 or len(data) == 0:
        raise ValueError(f"data must be (N, *D) with N >= 1, got {tuple(data.shape)}")
    check_finite(data, "data")
    batch = data[:2]
    if transform is not None:
        batch = transform(batch, torch.Generator(data.device).manual_seed(0))
    check_state(batch, "data" if transform is None else "transform(data)")
    shape = getattr(model, "shape", None)
    if shape is not None and tuple(batch.shape[1:]) != tuple(shape):
        raise ValueError(f"data must be {batch_of(shape, 'N')}, got {tuple(data.shape)}")
    _check_labels(model, data, labels)
    if isinstance(model, ScoreNetwork) and transform is None:
        _check_scale(model.data_std, float(data.std(correction=0)))


def _check_scale(expected: float, std: float) -> None:
    """Warn where noise that is made for one scale meets data of another by a factor of ten."""
    if not 0.1 * expected <= std <= 10 * expected:
        warnings.warn(
            f"the data have standard deviation {std:.3g}, the model expects {expected:.3g}:"
            " scale the data, (x - x.mean(0)) / x.std(0), or pass data_std=...",
            stacklevel=4,
        )


def _check_labels(model: nn.Module, data: Tensor, labels: Tensor | None) -> None:
    classes = getattr(model, "classes", None)
    if labels is None:
        if classes is not None:
            raise ValueError(f"the model has {classes} classes: give labels, or build it without")
        return
    if isinstance(model, ScoreNetwork) and classes is None:
        raise ValueError("labels were given, but the network has no classes: pass classes=...")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != data.shape[:1]:
        raise ValueError(f"labels must be ({len(data)},), got {tuple(labels.shape)}")
    if classes is not None and bool(((labels < 0) | (labels >= classes)).any()):
        i = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise ValueError(
            f"labels must lie in 0 .. {classes - 1}, got {int(labels[i])} at index {i}"
        )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    """Give the global generators back as they were."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[_index(device)] if device.type == "cuda" else []):
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)
