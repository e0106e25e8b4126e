"""A run and its folder: what it leaves on disk, and how it is taken up again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..ops import as_path
from ..scores import Learned, ScoreNetwork
from .average import Average
from .checkpoints import CheckpointError, load, save
from .folder import BEFORE, alone, as_os_error, check_free, read_state, write_state
from .history import History, read_history, write_history
from .interrupts import Interrupts
from .layout import Layout
from .packing import bare
from .recipe import Recipe
from .registry import known
from .shards import like, local, whole
from .snapshots import clear_snapshots, write_snapshot
from .validation import Validation

M = TypeVar("M", bound=nn.Module)


class Saved(Generic[M]):
    """A model, its averages and its optimiser, as far as a run has brought them.

    Attributes:
        step, elapsed: steps and seconds so far.
        average: ``average.gathered()`` is the averaged model.
        layout: how the network computes; None until the run has chosen.
        history: (step, mean loss since the look before), a pair for each look at the loss.
        validation: ``validation.losses`` has (step, loss on what is held out) of each look at it.
        folder: where checkpoints go; None for nowhere.
    """

    model: M
    recipe: Recipe
    validation: Validation
    optimizer: torch.optim.Optimizer
    _optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer]

    def __init__(
        self, model: M, recipe: Recipe, folder: str | Path | None, overwrite: bool, writes: bool
    ) -> None:
        self.model, self.recipe, self.average = model, recipe, Average(model, recipe.ema)
        self._narrow = Average(model, recipe.ema / 2) if recipe.snapshots else None
        self.folder = None if folder is None else as_path(folder, "folder")
        self.overwrite, self.is_main, self.sharded = overwrite, writes, False
        self.step, self.elapsed, self.layout = 0, 0.0, recipe.layout
        self.history: list[tuple[int, float]] = []
        self._file, self._notes = History(), list[str]()
        self._about: dict[str, Any] = {}
        self._owns_folder, self._holds_folder = False, False
        self._good: tuple[int, list[Tensor]] = (0, [])

    @property
    def _averages(self) -> list[Average[M]]:
        return [self.average, *([] if self._narrow is None else [self._narrow])]

    def save(self) -> None:
        """Write the averaged model and the state of the run, where there is a folder.

        Every process must call it.

        Raises:
            OSError: the folder holds another run or is in use by one, or one of them could not be
                written; a file that was there is whole.
        """
        if self.folder is None:
            return
        average = self.average.gathered()
        state = self._state() if self.is_main or self.sharded else {}
        with self._folder_alone() as folder:
            if folder is not None:
                # In this order: a state that says more than the model is never taken up.
                self._save_average(folder, average)
                self._save_state(folder, state)
                self._file.flush(folder)
                self._owns_folder = True

    def resume(self) -> None:
        """Take up the run that the folder holds, exactly where its last checkpoint left it.

        Process, network, prediction, data_std, data, labels, objective (where it is a dataclass),
        optimiser and recipe must be those of that run, but for ``steps`` and ``minutes``, with
        which the learning rate then goes on from another part of its curve, ``every``,
        ``save_every`` and ``accumulate``. Device, number of processes and parts of a batch may
        change: it is the same run, but for rounding and for the dropout of other parts.

        Where the last checkpoint cannot be read, the one before it is taken, with a warning.

        Raises:
            CheckpointError: no folder, no state in it, or one that is damaged or of another run;
                nothing has then been changed.
        """
        if self.folder is None:
            raise CheckpointError("no run to resume: the trainer has no folder")
        state = read_state(self.folder, {**self._state(), "optimizer": self._moments()})
        self._load_weights(state)
        self.step = state["step"]
        for average in self._averages:
            average.steps = self.step
        self.elapsed, self._owns_folder = state["elapsed"], True
        self.validation.losses = [(step, loss) for step, loss in state["validation"]]
        self.validation.best = state["best"]
        self.layout = None if state["layout"] is None else Layout(**state["layout"])
        self._compare_length(*state["length"])
        self.history = [(look.step, look.loss) for look in read_history(self.folder, self.step)]
        score = bare(self.average.module)
        if isinstance(score, Learned):
            net = copy.deepcopy(score.net) if isinstance(score, ScoreNetwork) else None
            with suppress(CheckpointError):  # the model may be damaged: it is written anew
                score.tuned = load(self.folder, net=net).tuned

    def _load_weights(self, state: dict[str, Any]) -> None:
        if self.sharded:
            with torch.no_grad():
                for name, part in self.model.state_dict().items():
                    part.copy_(like(state["model"][name], part))
        else:
            self.model.load_state_dict(state["model"])
        for name, average in self._named_averages():
            average.module.load_state_dict(state[name])
            average.fill()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {k: _spread(v, parameters[i]) for k, v in values.items()}
            for i, values in state["optimizer"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _compare_length(self, steps: int | None, minutes: float | None) -> None:
        here = (self.recipe.steps, self.recipe.minutes)
        if (steps, minutes) != here:
            self._notes.append(
                f"the run was to end at {_length(steps, minutes)} and ends at {_length(*here)}:"
                f" the learning rate follows the new length from step {self.step} on"
            )

    def _moments(self) -> dict[int, dict[str, Any]]:
        """What the optimiser keeps of each parameter: that of another after a step of zero."""
        twins = [torch.zeros(p.shape, dtype=p.dtype) for p in self.model.parameters()]
        for twin in twins:
            twin.grad = torch.zeros_like(twin)
        optimizer = self._optimizer_of(twins)
        optimizer.step()
        moments: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        return moments

    def _weights(self) -> list[Tensor]:
        """All that a step changes in model and averages, as far as it lies here."""
        own = [*map(local, self.model.parameters()), *map(local, self.model.buffers())]
        return own + [part for average in self._averages for part in average.parts()]

    @torch.no_grad()
    def _keep(self) -> None:
        """Remember the weights as good."""
        self._good = (self.step, [t.clone() for t in self._weights()])

    @torch.no_grad()
    def _go_back(self, together: bool) -> str:
        """To the last good weights, which are written; says what went wrong with that.

        ``together``: all processes do so; without the others the parts cannot be gathered.
        """
        self.step, kept = self._good
        for t, good in zip(self._weights(), kept, strict=True):
            t.copy_(good)
        for average in self._averages:
            average.steps = self.step
        if self.folder is not None and (together or not self.sharded):
            module = self.average.gathered()
            try:
                if self.is_main:
                    self._save_average(self.folder, module)
            except OSError as error:
                return f" (nor could the model be saved: {error})"
        return ""

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

    def _begin(self) -> None:
        """What must be so before the first step: an outdated tuning gone, a folder that takes
        what will be written."""
        for module in map(bare, (self.model, self.average.module)):
            if isinstance(module, Learned):
                module.tuned = None
        average, state = self.average.gathered(), self._state()
        with self._folder_alone() as folder:
            if folder is None:
                return
            # The state first: it is the larger, and where it fails a model that is there stays.
            self._save_state(folder, state)
            self._save_average(folder, average)
            if not self._owns_folder:  # what another run left
                (folder / BEFORE).unlink(missing_ok=True)
            clear_snapshots(folder, self.step)
            write_history(read_history(folder, self.step) if self._owns_folder else [], folder)
            self._owns_folder = True

    def _try_to_save(self) -> None:
        try:
            self.save()
        except OSError as error:
            warnings.warn(
                f"after step {self.step} the run could not be saved: {error}", stacklevel=4
            )

    def _try_to_store_snapshot(self, before: float, now: float) -> None:
        """Store both averages where the run has come over a mark."""
        n = self.recipe.snapshots
        if int(before * n) == int(now * n) or self._narrow is None or self.folder is None:
            return
        modules = [average.gathered() for average in self._averages]
        try:
            if self.is_main:
                write_snapshot(self.folder, self.step, self.recipe.ema, modules)
        except OSError as error:
            warnings.warn(
                f"after step {self.step} no snapshot could be stored: {error}", stacklevel=4
            )

    def _stop(self, interrupts: Interrupts) -> None:
        interrupts.obey(f"stopped after step {self.step}; {self.folder} holds the run: resume it")

    def _save_state(self, folder: Path, state: dict[str, Any]) -> None:
        with as_os_error(folder):
            write_state(folder, state)

    def _save_average(self, folder: Path, average: nn.Module) -> None:
        if known(bare(average)):
            with as_os_error(folder), self.validation.best_of(average):
                save(average, folder)

    def _named_averages(self) -> list[tuple[str, Average[M]]]:
        return list(zip(("average", "narrow"), self._averages, strict=False))

    def _state(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]
        return {
            "run": self._about,
            "step": self.step,
            "elapsed": self.elapsed,
            "length": [self.recipe.steps, self.recipe.minutes],
            "layout": None if self.layout is None else asdict(self.layout),
            "validation": [list(look) for look in self.validation.losses],
            "best": self.validation.best,
            "model": {k: whole(v) for k, v in self.model.state_dict().items()},
            **{name: a.gathered().state_dict() for name, a in self._named_averages()},
            "optimizer": {i: {k: whole(v) for k, v in m.items()} for i, m in moments.items()},
        }


def _spread(value: Any, parameter: Tensor) -> Any:
    """Of what an optimiser keeps, that which has the parameter's shape lies where it lies."""
    fits = isinstance(value, Tensor) and value.shape == parameter.shape
    return like(value, parameter) if fits else value


def _length(steps: int | None, minutes: float | None) -> str:
    told = [f"{steps} steps" if steps else "", f"{minutes:g} minutes" if minutes else ""]
    return " or ".join(filter(None, told))
