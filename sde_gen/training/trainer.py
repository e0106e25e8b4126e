"""Training: Adam on a loss, an average of the weights, a clock, and a way back from a crash.

Every step draws from generators seeded by (seed, process, step), so a run that was stopped after
any of them and resumed does exactly what it would have done, and the global generators are left
as they were. Nothing waits for the device but a look at the losses, every few steps: NaN is
looked for, the weights are kept as good, the bar moves. Several processes agree on the clock and
on whether to stop, on their hosts, after each step.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from ..noise import Streams
from ..ops import as_path
from ..scores import ScoreNetwork
from .average import Average
from .checkpoints import CheckpointError, describe, load, save
from .devices import accelerator, globals_kept, pick_device, seed_globally
from .folder import STATE, about, alone, as_os_error, check_free, read_state, write_state
from .inputs import Transform, check_data, check_kinds
from .interrupts import Interrupts
from .losses import Denoising, Objective
from .packing import bare
from .recipe import Recipe, learning_rate
from .registry import known
from .rows import remember

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        transform: applied to every batch, which it may change in place.
        device: the fastest there is, by default.
        folder: where checkpoints go, of the average and of the state of the run.
        overwrite: whether the run or model that the folder already holds may go.

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
        data: Tensor,
        labels: Tensor | None = None,
        recipe: Recipe | None = None,
        *,
        objective: Objective | None = None,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.recipe = recipe = Recipe() if recipe is None else recipe
        check_kinds(model, recipe, objective, transform)
        self.accelerator = accelerator(device)
        self.device = self.accelerator.device if self.accelerator else pick_device(device)
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        if recipe.batch % self.processes:
            raise ValueError(f"batch {recipe.batch} does not divide by {self.processes} processes")
        check_data(model, data, labels, transform)
        self.objective = Denoising() if objective is None else objective
        self.transform = transform
        self.folder, self.overwrite = (
            None if folder is None else as_path(folder, "folder"),
            overwrite,
        )
        self._about: dict[str, Any] = {}
        if folder is not None:
            if isinstance(bare(model), ScoreNetwork) or known(bare(model)):
                describe(model)
            self._about = about(model, data, labels, recipe, self.objective)
        self.model = model.to(self.device)
        self.data = data.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.average = Average(self.model, recipe.ema)
        self.optimizer = torch.optim.Adam(
            model.parameters(), recipe.lr, (0.9, 0.99), fused=self.device.type in ("cpu", "cuda")
        )
        self.step, self.elapsed = 0, 0.0
        self.history: list[tuple[int, float]] = []
        self._hosts = torch.distributed.new_group(backend="gloo") if self.accelerator else None
        self._clock, self._stopping = 0.0, False
        self._owns_folder, self._holds_folder = False, False
        self._good: tuple[int, list[dict[str, Tensor]]] = (0, [])

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.accelerator is None or self.accelerator.is_main_process

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
            if self._progress() < 1:
                self._begin(folder)
                with self._bar(progress) as bar, globals_kept(self.device):
                    self._train(bar, interrupts)
            self.model.eval()
            self.save()
            if interrupts.pending:
                self._stop(interrupts)
        if self.accelerator:
            self.accelerator.wait_for_everyone()
        return self.average.module.eval()

    def save(self) -> None:
        """Write the averaged model and the state of the run, where there is a folder.

        Raises:
            OSError: the folder holds another run or is in use by one, or one of them could not be
                written; a file that was there is whole.
        """
        with self._folder_alone() as folder:
            if folder is not None:
                # In this order: a state that says more than the model is never taken up.
                self._save_average(folder)
                self._save_state(folder)
                self._owns_folder = True

    def resume(self) -> None:
        """Take up the run that the folder holds, exactly where its last checkpoint left it.

        Process, network, prediction, data_std, data, labels, objective (where it is a dataclass)
        and recipe must be those of that run, but for ``steps`` and ``minutes``, with which the
        learning rate then goes on from another part of its curve, ``every`` and ``save_every``.
        Device and number of processes may change; then the run is as good, but not the same.

        Raises:
            CheckpointError: no folder, no state in it, or one that is damaged or of another run;
                nothing has then been changed.
        """
        if self.folder is None:
            raise CheckpointError("no run to resume: the trainer has no folder")
        groups = self.optimizer.state_dict()["param_groups"]
        steps = torch.zeros(())
        moments = {
            i: {"step": steps, "exp_avg": p, "exp_avg_sq": p}
            for i, p in enumerate(self.model.parameters())
        }
        state = read_state(self.folder, {**self._state(), "optimizer": moments})
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.step = self.average.steps = state["step"]
        self.elapsed, self._owns_folder = state["elapsed"], True
        average = bare(self.average.module)
        if isinstance(average, ScoreNetwork):
            with suppress(CheckpointError):  # the model may be damaged: it is written anew
                average.tuned = load(self.folder, net=copy.deepcopy(average.net)).tuned

    def _train(self, bar: Any, interrupts: Interrupts) -> None:
        model = self.accelerator.prepare_model(self.model) if self.accelerator else self.model
        self._clock = saved = time.perf_counter()
        self._stopping = False
        self.model.train()
        self._keep()
        while self._progress() < 1:
            loss = self._window(model, interrupts)
            self._keep()
            self.history.append((self.step, loss))
            bar.set_postfix_str(f"loss {loss:.4f}, step {self.step}", refresh=False)
            bar.update(round(100 * self._progress(), 1) - bar.n)
            if self._stopping:
                try:
                    self._try_to_save()
                finally:
                    self._stop(interrupts)
            if time.perf_counter() - saved > 60 * self.recipe.save_every:
                self._try_to_save()
                saved = time.perf_counter()

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
            self._agree(interrupts)
            if len(reports) == self.recipe.every or self.elapsed - began > 2:
                break
        losses, norms = self._mean(torch.stack(reports, 1)).tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss):
                raise self._failure(start + i, f"the loss is {loss}")
            if not math.isfinite(norm):
                raise self._failure(start + i, f"the gradient's norm is {norm}")
        self._agree(interrupts)
        return sum(losses) / len(losses)

    def _step(self, model: nn.Module) -> Tensor:
        """One step; returns loss and gradient norm, on the device, without waiting for them."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * learning_rate(self._progress(0.5), self.recipe.warmup)
        self._seed_dropout()
        n = self.recipe.batch // self.processes
        # Sample m of the run is the same, and has the same noise, whoever computes it.
        noise = Streams(self.recipe.seed, self.step * self.recipe.batch + self._rank * n)
        u = noise.uniform(torch.empty(n, device=self.device, dtype=self._wide), "item")
        rows = (u * len(self.data)).long()
        x = self.data[rows]
        x = x if self.transform is None else self.transform(x, noise)
        y = None if self.labels is None else self.labels[rows]
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

    def _progress(self, ahead: float = 0.0) -> float:
        """The part of the budget used ``ahead`` steps from here, in [0, 1]."""
        steps, minutes, step = self.recipe.steps, self.recipe.minutes, self.step + ahead
        parts = [step / steps] if steps else []
        if minutes:
            # Ahead of the clock time goes on at the mean rate so far.
            parts.append(self.elapsed * step / max(self.step, 1) / (60 * minutes))
        return min(1.0, max(parts))

    def _agree(self, interrupts: Interrupts) -> None:
        """Read the clock, and whether to stop; all processes get the same answers."""
        now = time.perf_counter()
        seconds, told = now - self._clock, interrupts.pending is not None
        self._clock = now
        if self._hosts is not None:
            both = torch.tensor([seconds, told], dtype=torch.float64)
            torch.distributed.all_reduce(both, group=self._hosts)
            seconds, told = float(both[0]) / self.processes, bool(both[1] > 0)
        self.elapsed += seconds
        self._stopping = told

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _seed_dropout(self) -> None:
        """Seed the global generators, which dropout reads, for the step to come."""
        name = f"{self.recipe.seed}, {self._rank}, {self.step}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        seed_globally(self.device, seed)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, so that all decide alike."""
        return self.accelerator.reduce(values, "mean") if self.accelerator else values

    def _keep(self) -> None:
        """Remember the weights as good."""
        states = (self.model.state_dict(), self.average.module.state_dict())
        self._good = (self.step, [{k: v.clone() for k, v in s.items()} for s in states])

    def _failure(self, step: int, reason: str) -> TrainingError:
        """Go back to the last good weights, write them, and say what happened."""
        self.step, (model, average) = self._good
        self.average.steps = self.step
        self.model.load_state_dict(model)
        self.average.module.load_state_dict(average)
        if self.folder is not None and self.is_main:
            try:
                self._save_average(self.folder)
            except OSError as error:
                reason += f" (nor could the model be saved: {error})"
        return TrainingError(step, reason, self.step)

    @contextmanager
    def _folder_alone(self) -> Iterator[Path | None]:
        """Hold the folder, if there is one and this process writes it."""
        folder = self.folder if self.is_main else None
        if folder is None or self._holds_folder:
            yield folder
            return
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (self.overwrite or self._owns_folder):
                check_free(folder)
            self._holds_folder = True
            try:
                yield folder
            finally:
                self._holds_folder = False

    def _begin(self, folder: Path | None) -> None:
        """What must be so before the first step: an outdated tuning gone, a folder that takes
        what will be written."""
        for module in map(bare, (self.model, self.average.module)):
            if isinstance(module, ScoreNetwork):
                module.tuned = None
        if folder is not None:
            # The state first: it is the larger, and where it fails a model that is there stays.
            self._save_state(folder)
            self._save_average(folder)
            remember(self.data, folder)
            self._owns_folder = True

    def _try_to_save(self) -> None:
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"after step {self.step} the run could not be saved: {error}", stacklevel=4
            )

    def _stop(self, interrupts: Interrupts) -> None:
        interrupts.obey(f"stopped after step {self.step}; {self.folder} holds the run: resume it")

    def _save_state(self, folder: Path) -> None:
        with as_os_error(folder):
            write_state(folder, self._state())

    def _save_average(self, folder: Path) -> None:
        if known(bare(self.average.module)):
            with as_os_error(folder):
                save(self.average.module, folder)

    def _state(self) -> dict[str, Any]:
        return {
            "run": self._about,
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }

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
    transform: Transform | None
    device: torch.device | str | None
    folder: str | Path | None
    overwrite: bool


def train(
    model: M,
    data: Tensor,
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
            ``objective``, ``transform``, ``device``, ``folder`` and ``overwrite``.
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
