"""Training: Adam on a loss, an average of the weights, a clock, and a way back from a crash.

Every step draws from generators seeded by (seed, process, step), so a run that was stopped after
any of them and resumed does exactly what it would have done, and the global generators are left
as they were. Nothing waits for the device but a look at the losses, every few steps: NaN is
looked for, the weights are kept as good, the bar moves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..data.order import Order
from ..data.sources import as_source
from ..ops import check_count
from ..scores import ScoreNetwork
from .batches import Batch, Reader, Share, default_workers
from .checkpoints import describe
from .clock import Clock
from .devices import accelerator, globals_kept, pick_device, seed_globally
from .folder import STATE, about
from .inputs import Transform, as_transforms, check_data, check_kinds
from .interrupts import Interrupts
from .losses import Denoising, Objective
from .packing import bare
from .recipe import Recipe, learning_rate
from .registry import known
from .rows import remember
from .saving import M, Saved
from .validation import Validation

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TrainingError(RuntimeError):
    """Training cannot go on. ``step`` says where; the model has its last good weights."""

    def __init__(self, step: int, reason: str, kept: int) -> None:
        super().__init__(
            f"training stopped at step {step}: {reason}; the model has the weights of step {kept}"
        )
        self.step, self.kept = step, kept


class Trainer(Saved[M]):
    """Trains ``model`` in place; ``average`` holds the averaged copy that ``run`` returns.

    Args:
        model: a ``ScoreNetwork``, or any module that ``objective`` knows.
        data: a tensor (N, *D), floating point, or what ``transform`` makes such, which is moved to
            the device; a pair (x, y); a map-style ``Dataset`` with items x, (x, y) or a dictionary
            of x and what else the network is given; a ``.npy`` file or a folder of images, which
            are read while it trains. Integers are grey levels where the model's facts know how
            many there are, and stay what they are until they are on the device.
        labels: (N,) int64, beside a tensor alone, for a conditional model.
        recipe: how long, how fast, how smoothly.
        objective: the loss; ``Denoising()`` by default.
        transform: applied to every batch, which it may change in place; or several, in turn.
        device: the fastest there is, by default.
        folder: where checkpoints go, of the average and of the state of the run.
        overwrite: whether the run or model that the folder already holds may go.
        workers: processes that read data which are not in memory ahead; the run is the same with
            any number, 0 among them.

    Under a launcher of several processes (``torchrun``, ``accelerate launch``) each takes its
    part of the batch.

    Raises:
        TypeError, ValueError: data that are integers, NaN, infinite or of the wrong shape, labels
            missing or out of range, a model that cannot be saved: before anything is done.
        RuntimeError: a device that is not there.
    """

    def __init__(
        self,
        model: M,
        data: object,
        labels: Tensor | None = None,
        recipe: Recipe | None = None,
        *,
        objective: Objective | None = None,
        transform: Transform | Sequence[Transform] | None = None,
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
        workers: int | None = None,
    ) -> None:
        recipe = Recipe() if recipe is None else recipe
        check_kinds(model, recipe, objective, transform)
        source, transforms = as_source(data, labels), as_transforms(transform)
        order = Order(len(source), recipe.seed, recipe.holdout)
        self.recipe = recipe = recipe.for_items(order.trained)
        self.accelerator = accelerator(device)
        self.device = self.accelerator.device if self.accelerator else pick_device(device)
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        if recipe.batch % self.processes:
            raise ValueError(f"batch {recipe.batch} does not divide by {self.processes} processes")
        levels = getattr(getattr(bare(model), "facts", None), "levels", None)
        check_data(model, source, transforms, levels)
        self.objective = Denoising() if objective is None else objective
        if folder is not None and (isinstance(bare(model), ScoreNetwork) or known(bare(model))):
            describe(model)
        writes = self.accelerator is None or self.accelerator.is_main_process
        super().__init__(model.to(self.device), recipe.ema, folder, overwrite, writes)
        if folder is not None:
            self._about = about(model, source, recipe, self.objective)
        workers = (
            default_workers(source) if workers is None else check_count(workers, "workers", 0)
        )
        self.reader = Reader(source, order, transforms, levels, self.device, workers)
        self.validation = Validation(self.reader, self.objective, recipe)
        self.optimizer = torch.optim.Adam(
            model.parameters(), recipe.lr, (0.9, 0.99), fused=self.device.type in ("cpu", "cuda")
        )
        hosts = torch.distributed.new_group(backend="gloo") if self.accelerator else None
        self._clock, self._stopping = Clock(hosts), False

    def run(self, progress: bool = True) -> M:
        """Train to the end of the budget; returns the averaged model, in evaluation mode.

        Ctrl-C and SIGTERM are obeyed once the step is done and saved, where there is a folder; a
        second Ctrl-C at once. A save on the way that fails is a warning, and the run goes on.

        Args:
            progress: show a bar with the loss.

        Raises:
            TrainingError: a loss or gradient is not finite, or the objective raised.
            OSError: the folder holds a run or model already (``FileExistsError``), is in use by
                another run (``BlockingIOError``) or cannot be written, before the first step; the
                last save failed: ``average`` has the model then.
        """
        with self._folder_alone() as folder, Interrupts(self.folder is not None) as interrupts:
            if not self._is_done:
                self._begin(folder)
                if folder is not None:
                    remember(self.reader.trained(), folder)
                with (
                    self._bar(progress) as bar,
                    globals_kept(self.device),
                    closing(self.reader),
                ):
                    self._train(bar, interrupts)
            self.model.eval()
            self.save()
            self.validation.give_best(self.average.module)
            if interrupts.pending:
                self._stop(interrupts)
        if self.accelerator:
            self.accelerator.wait_for_everyone()
        return self.average.module.eval()

    def _train(self, bar: Any, interrupts: Interrupts) -> None:
        model = self.accelerator.prepare_model(self.model) if self.accelerator else self.model
        self._clock.start()
        self._stopping, saved = False, self.elapsed
        self.model.train()
        self._keep()
        while not self._is_done:
            loss = self._window(model, interrupts)
            self._keep()
            self.history.append((self.step, loss))
            self._validate()
            note = f"loss {loss:.4f}{self.validation.note}, step {self.step}"
            bar.set_postfix_str(note, refresh=False)
            bar.update(round(100 * self._progress(), 1) - bar.n)
            if self._stopping:
                try:
                    self._try_to_save()
                finally:
                    self._stop(interrupts)
            if self.elapsed - saved > 60 * self.recipe.save_every:
                self._try_to_save()
                saved = self.elapsed

    def _window(self, model: nn.Module, interrupts: Interrupts) -> float:
        """Take up to ``every`` steps, or those of two seconds; returns their mean loss."""
        start, began = self.step, self.elapsed
        reports: list[Tensor] = []
        while not self._stopping and self._progress() < 1:
            try:
                reports.append(self._step(model))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise self._failure(self.step, f"{type(error).__name__}: {error}") from error
            self.step += 1
            self._look_at_clock(interrupts)
            if len(reports) == self.recipe.every or self.elapsed - began > 2:
                break
            if self.validation.is_due(self.step):
                break
        losses, norms = self._mean(torch.stack(reports, 1)).tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss):
                raise self._failure(start + i, f"the loss is {loss}")
            if not math.isfinite(norm):
                raise self._failure(start + i, f"the gradient's norm is {norm}")
        self._look_at_clock(interrupts)
        return sum(losses) / len(losses)

    def _step(self, model: nn.Module) -> Tensor:
        """One step; returns loss and gradient norm, on the device, without waiting for them."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * learning_rate(self._progress(0.5), self.recipe.warmup)
        self._seed_dropout()
        n = self.recipe.batch // self.processes
        x, y, noise = self._batch(self.step * self.recipe.batch + self._rank * n, n)
        half = self.recipe.autocast and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            losses = self.objective(model, x, y, noise)
        loss = losses.mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return torch.stack([loss.detach().float(), norm.float()])

    def _batch(self, first: int, n: int) -> Batch:
        """Samples first .. first + n - 1 of the run: the same, with the same noise, whoever
        computes them."""
        return self.reader(first, n, Share(self.recipe.batch, self._rank, self.processes))

    @property
    def _is_done(self) -> bool:
        return self._progress() >= 1 or self.validation.is_over

    def _validate(self) -> None:
        """Look at the loss on what is held out, if it is time for it."""
        last = self.recipe.holdout > 0 and self._progress() >= 1
        if last or self.validation.is_due(self.step):
            loss = self._mean(self.validation.loss(self.average.module).to(self.device).float())
            self.validation.take(self.step, float(loss), self.average.module)

    def _look_at_clock(self, interrupts: Interrupts) -> None:
        seconds, self._stopping = self._clock.agree(interrupts.pending is not None)
        self.elapsed += seconds

    def _progress(self, ahead: float = 0.0) -> float:
        """The part of the budget used ``ahead`` steps from here, in [0, 1]."""
        steps, minutes, step = self.recipe.steps, self.recipe.minutes, self.step + ahead
        parts = [step / steps] if steps else []
        if minutes:
            # Ahead of the clock time goes on at the mean rate so far.
            parts.append(self.elapsed * step / max(self.step, 1) / (60 * minutes))
        return min(1.0, max(parts))

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    def _seed_dropout(self) -> None:
        """Seed the global generators, which dropout reads, for the step to come."""
        name = f"{self.recipe.seed}, {self._rank}, {self.step}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        seed_globally(self.device, seed)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, so that all decide alike."""
        return self.accelerator.reduce(values, "mean") if self.accelerator else values

    def _failure(self, step: int, reason: str) -> TrainingError:
        """Go back to the last good weights, write them, and say what happened."""
        reason += self._go_back()
        return TrainingError(step, reason, self.step)

    def _bar(self, show: bool) -> Any:
        hide = not (show and self.is_main)
        if hide:  # tqdm.auto looks for a notebook and may warn that it found none
            from tqdm import tqdm
        else:
            from tqdm.auto import tqdm

        form = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=100, desc="training", bar_format=form, disable=hide, leave=True)


class Options(TypedDict, total=False):
    """The keywords of ``Trainer``, which describes them."""

    objective: Objective | None
    transform: Transform | Sequence[Transform] | None
    device: torch.device | str | None
    folder: str | Path | None
    overwrite: bool
    workers: int | None


def train(
    model: M,
    data: object,
    labels: Tensor | None = None,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    **options: Unpack[Options],
) -> M:
    """Train a model; returns its average over the run, ready to sample. See ``Trainer``.

    Args:
        model, data, labels, recipe, options: what ``Trainer`` takes, with its keywords
            ``objective``, ``transform``, ``device``, ``folder``, ``overwrite`` and ``workers``.
        resume: take up the run in ``folder`` where it stopped, if it holds one.
        progress: show a bar with the loss.

    Raises:
        ValueError: resume without a folder, or together with overwrite. And what ``Trainer``, its
            ``resume`` and its ``run`` raise.

    >>> from sde_gen import VP, ScoreNetwork
    >>> from sde_gen.networks import MLP
    >>> data = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> recipe = Recipe(steps=20, batch=64)
    >>> model = train(ScoreNetwork(MLP((2,)), VP()), data, recipe=recipe, progress=False)
    >>> model(data[:4], 0.5).shape
    torch.Size([4, 2])
    """
    if resume and (options.get("overwrite") or options.get("folder") is None):
        raise ValueError("resume needs a folder, and a run that is resumed is not overwritten")
    trainer = Trainer(model, data, labels, recipe, **options)
    if resume and trainer.folder is not None and (trainer.folder / STATE).exists():
        trainer.resume()
    return trainer.run(progress)
