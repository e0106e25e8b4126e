"""Training: Adam on a loss, an average of the weights, a clock, and a way back from a crash.

Every step draws from generators seeded by (seed, process, step), so a run that was stopped after
any of them and resumed does exactly what it would have done, and the global generators are left
as they were. Nothing waits for the device but a look at the losses, every few steps: NaN is
looked for, the weights are kept as good, the bar moves.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..data.order import Order
from ..data.sources import as_source
from ..scores import ScoreNetwork
from .bar import bar_of, tell
from .batches import Batch, Reader, Share
from .checkpoints import describe
from .clock import Clock
from .devices import accelerator, globals_kept, pick_device, seed_globally
from .fingerprint import about
from .folder import holds_run
from .history import Look
from .inputs import (
    Transform,
    as_transforms,
    check_data,
    check_functions,
    check_kinds,
    check_recipe,
)
from .interrupts import Interrupts
from .layout import Layout, choose, for_parts, laid_out
from .losses import Denoising, Objective
from .packing import bare
from .recipe import Recipe, adam, learning_rate
from .registry import known
from .rows import remember
from .saving import M, Saved
from .shards import asks_for_shards, unsynchronised, whole
from .validation import Validation

if TYPE_CHECKING:
    from typing_extensions import Unpack


OptimizerOf = Callable[[list[Any]], torch.optim.Optimizer]
"""parameters -> an optimiser of them."""

Callback = Callable[["Trainer[Any]", int, float], object]
"""(trainer, step, loss), called at every look at the loss."""


class TrainingError(RuntimeError):
    """Training cannot go on. ``step`` says where; the model has its last good weights.

    >>> print(sg.training.TrainingError(7, "the loss is NaN", 5))
    training stopped at step 7: the loss is NaN; the model has the weights of step 5
    """

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
        context: what else the network is given, by name: tensors or arrays (N, ...) beside a
            tensor, ``{"theta": theta}``; NaN where it is not known.
        recipe: how long, how fast, how smoothly.
        objective: the loss; ``Denoising()`` by default.
        transform: applied to every batch, which it may change in place; or several, in turn.
        optimizer: parameters -> the optimiser, whose own learning rates are then the peaks:
            ``lambda parameters: torch.optim.AdamW(parameters, 1e-3)``; Adam by default.
        callbacks: each is called as (trainer, step, loss) at every look at the loss, in every
            process; ``trainer.look`` tells the rest.
        device: the fastest there is, by default.
        folder: where checkpoints go, of the average and of the state of the run, and the history.
        overwrite: whether the run or model that the folder already holds may go.
        shard: whether several processes spread the weights among them (FSDP2); None for what
            ``accelerate launch --use_fsdp`` says.
        workers: processes that read data which are not in memory ahead; the run is the same with
            any number, 0 among them.

    Under a launcher of several processes (``torchrun``, ``accelerate launch``) each takes its
    part of the batch.

    Attributes:
        look: the last look at the loss.

    Raises:
        TypeError, ValueError: data that are integers, NaN, infinite or of the wrong shape, labels
            missing or out of range, a model that cannot be saved: before anything is done.
        RuntimeError: a device that is not there.

    >>> x = torch.randn(64, 2)
    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP(), facts=sg.Facts.of(x))
    >>> trainer = sg.Trainer(model, x, recipe=sg.Recipe(steps=3, batch=16), device="cpu")
    >>> average = trainer.run(progress=False)
    """

    def __init__(
        self,
        model: M,
        data: object,
        labels: Tensor | None = None,
        recipe: Recipe | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        objective: Objective | None = None,
        transform: Transform | Sequence[Transform] | None = None,
        optimizer: OptimizerOf | None = None,
        callbacks: Sequence[Callback] = (),
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
        shard: bool | None = None,
        workers: int | None = None,
    ) -> None:
        recipe = Recipe() if recipe is None else recipe
        check_kinds(model, recipe, objective, transform)
        check_functions(optimizer, callbacks)
        source, transforms = as_source(data, labels, context), as_transforms(transform)
        order = Order(len(source), recipe.seed, recipe.holdout)
        recipe = recipe.for_items(order.trained)
        self.accelerator = accelerator(device)
        self.device = self.accelerator.device if self.accelerator else pick_device(device)
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        check_recipe(recipe, self.processes, folder)
        levels = getattr(getattr(bare(model), "facts", None), "levels", None)
        check_data(model, source, transforms, levels)
        self.objective = Denoising() if objective is None else objective
        self.callbacks = list(callbacks)
        if folder is not None and (isinstance(bare(model), ScoreNetwork) or known(bare(model))):
            describe(model)
        writes = self.accelerator is None or self.accelerator.is_main_process
        super().__init__(model.to(self.device), recipe, folder, overwrite, writes)
        self._optimizer_of = partial(adam, recipe.lr) if optimizer is None else optimizer
        self.optimizer = self._optimizer_of(list(model.parameters()))
        if folder is not None:
            self._about = about(model, source, recipe, self.objective, self.optimizer)
        if self.accelerator and (asks_for_shards() if shard is None else shard):
            self._spread()
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.reader = Reader(source, order, transforms, levels, self.device, workers)
        self.validation = Validation(self.reader, self.objective, recipe)
        self._clock, self._stopping = Clock(self.processes), False
        self.look = Look(0, math.nan)

    def run(self, progress: bool = True) -> M:
        """Train to the end of the budget; returns the averaged model, in evaluation mode.

        Ctrl-C, SIGTERM and SIGUSR1 are obeyed once the step is done and saved, where there is a
        folder; a second Ctrl-C at once. A save on the way that fails is a warning, and the run
        goes on.

        Args:
            progress: show a bar with the loss, and say what was chosen.

        Raises:
            TrainingError: a loss or gradient is not finite, or the objective raised.
            OSError: the folder holds a run or model already (``FileExistsError``), is in use by
                another run (``BlockingIOError``) or cannot be written, before the first step; the
                last save failed: ``average`` has the model then.
        """
        with self._folder_alone() as folder, Interrupts(self.folder is not None) as interrupts:
            if not self.done:
                self._begin()
                if folder is not None:
                    remember(self.reader.trained(), folder)
                with (
                    bar_of(progress and self.is_main) as bar,
                    globals_kept(self.device),
                    closing(self.reader),
                ):
                    self._clock.start()
                    self._choose_layout()
                    self._train(bar, interrupts)
            self.model.eval()
            self.save()
            average = self.average.gathered()
            self.validation.give_best(average)
            if interrupts.pending:
                self._stop(interrupts)
        if self.accelerator:
            self.accelerator.wait_for_everyone()
        return average.eval()

    def _train(self, bar: Any, interrupts: Interrupts) -> None:
        self._stopping, saved, began = False, self.elapsed, self.step
        self.model.train()
        self._keep()
        averages = [average.module for average in self._averages]
        layout = self.layout or Layout()
        with laid_out(for_parts(layout) if self.sharded else layout, self.model, *averages):
            model = self._joined()
            while not self.done:
                before = self._progress()
                self._window(model, interrupts, self.step == began)
                self._keep()
                self._validate()
                self._tell(bar)
                self._try_to_store_snapshot(before, self._progress())
                if self._stopping:
                    try:
                        self._try_to_save()
                    finally:
                        self._stop(interrupts)
                if self.elapsed - saved > 60 * self.recipe.save_every:
                    self._try_to_save()
                    saved = self.elapsed

    def _window(self, model: nn.Module, interrupts: Interrupts, first: bool) -> None:
        """Take steps to the next multiple of ``every``, those of two seconds, or the first one;
        then look at their losses."""
        start, began = self.step, self.elapsed
        reports: list[Tensor] = []
        while not self._stopping and self._progress() < 1:
            try:
                reports.append(self._step(model))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise self._failure(self.step, reason, together=False) from error
            self.step += 1
            self._look_at_clock(interrupts)
            if first or self.step % self.recipe.every == 0 or self.elapsed - began > 2:
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
        n, seconds = len(losses), max(self.elapsed - began, 1e-9)
        means = (sum(losses) / n, sum(norms) / n)
        self.look = Look(self.step, *means, self._rate(), n * self.recipe.batch / seconds)

    def _tell(self, bar: Any) -> None:
        """Bar, file and callbacks hear of the last look."""
        look, part = self.look, self._progress()
        self.history.append((look.step, look.loss))
        tell(bar, look, part, self.recipe, self.validation.note)
        for note in self._notes if self._notes and not bar.disable else ():
            bar.write(note, file=sys.stderr)
        self._notes = []
        if self.folder is not None and self.is_main:
            self._file.add(look, self.folder, self.elapsed)
        for callback in self.callbacks:
            callback(self, look.step, look.loss)

    def _step(self, model: nn.Module) -> Tensor:
        """One step; returns loss and gradient norm, on the device, without waiting for them."""
        rate, parts = self._rate(0.5), self.recipe.accumulate
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        n = self.recipe.batch // (self.processes * parts)
        total = torch.zeros((), device=self.device)
        for i in range(parts):
            first = self.step * self.recipe.batch + (self._rank * parts + i) * n
            self._seed_dropout(first)
            x, y, noise = self._batch(first, n)
            with nullcontext() if i + 1 == parts else unsynchronised(model):
                loss = self.objective(model, x, y, noise).mean() / parts
                loss.backward()
            total += loss.detach()
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self._averages:
            average.update_parameters(self.model)
        return torch.stack([total, norm.float()])

    def _batch(self, first: int, n: int) -> Batch:
        """Samples first .. first + n - 1 of the run: the same, with the same noise, whoever
        computes them."""
        return self.reader(first, n, Share(self.recipe.batch, self._rank, self.processes))

    def _validate(self) -> None:
        """Look at the loss on what is held out, if it is time for it."""
        last = self.recipe.holdout > 0 and self._progress() >= 1
        if last or self.validation.is_due(self.step):
            average = self.average.gathered()
            loss = float(self._mean(self.validation.loss(average).to(self.device).float()))
            self.validation.take(self.step, loss, average)
            self.look = self.look._replace(validation=loss)

    def _rate(self, ahead: float = 0.0) -> float:
        """The learning rate ``ahead`` steps from here, in parts of its peak."""
        return learning_rate(self._progress(ahead), self.recipe.warmup)

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

    def _choose_layout(self) -> None:
        """Of a new run, by timing a few steps; one that was taken up has chosen."""
        if self.layout is None and self.sharded:  # there is no copy to try anything on
            self.layout = Layout(half=self.device.type == "cuda")
        elif self.layout is None:
            n = self.recipe.batch // (self.processes * self.recipe.accumulate)
            self.layout, note = choose(self.model, n, self.recipe.steps_for, self._clock.mean)
            if note:
                self._notes.append(f"{note}. Recipe(layout=Layout(...)) sets it")

    def _spread(self) -> None:
        """Spread model and averages over the processes; each optimises its part."""
        from .shards import shard

        shard(self.model, self.device)
        self.sharded = True
        for average in self._averages:
            average.spread(self.model)
        self.optimizer = self._optimizer_of(list(self.model.parameters()))

    def _joined(self) -> nn.Module:
        """The model that adds gradients up over the processes."""
        if self.accelerator is None or self.sharded:
            return self.model
        joined: nn.Module = self.accelerator.prepare_model(self.model)
        return joined

    @property
    def done(self) -> bool:
        """Whether the budget is used, or the patience with the loss on what is held out."""
        return self._progress() >= 1 or self.validation.is_over

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    def _seed_dropout(self, first: int) -> None:
        """Seed the global generators, which dropout reads, for the part that begins with this
        sample."""
        name = f"{self.recipe.seed}, {first}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        seed_globally(self.device, seed)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, so that all decide alike."""
        return self.accelerator.reduce(values, "mean") if self.accelerator else values

    def _failure(self, step: int, reason: str, together: bool = True) -> TrainingError:
        """Go back to the last good weights, write them, and say what happened."""
        reason += self._go_back(together)
        return TrainingError(step, reason, self.step)


class Options(TypedDict, total=False):
    """The keywords of ``Trainer``, which describes them."""

    context: Mapping[str, Any] | None
    objective: Objective | None
    transform: Transform | Sequence[Transform] | None
    optimizer: OptimizerOf | None
    callbacks: Sequence[Callback]
    device: torch.device | str | None
    folder: str | Path | None
    overwrite: bool
    shard: bool | None
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

    A model that was trained before goes on from its weights, ``train(load(path), ...)``: network,
    process and facts stay (data, labels and conditions must fit them), the solver that it was
    tuned to is dropped, and optimiser, average and budget begin anew.

    Args:
        model, data, labels, recipe, options: what ``Trainer`` takes, with its keywords
            ``context``, ``objective``, ``transform``, ``optimizer``, ``callbacks``, ``device``,
            ``folder``, ``overwrite``, ``shard`` and ``workers``.
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
    if resume and trainer.folder is not None and holds_run(trainer.folder):
        trainer.resume()
    return trainer.run(progress)
