"""A run and its folder: what it leaves on disk, and how it is taken up again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..ops import as_path
from ..scores import ScoreNetwork
from .average import Average
from .checkpoints import CheckpointError, load, save
from .folder import alone, as_os_error, check_free, read_state, write_state
from .interrupts import Interrupts
from .packing import bare
from .registry import known
from .validation import Validation

M = TypeVar("M", bound=nn.Module)


class Saved(Generic[M]):
    """A model, its average and its optimiser, as far as a run has brought them.

    Attributes:
        step, elapsed: steps and seconds so far.
        average: ``average.module`` is the averaged model.
        history: (step, mean loss since the look before), a pair for each look at the loss.
        validation: ``validation.losses`` has (step, loss on what is held out) of each look at it.
        folder: where checkpoints go; None for nowhere.
    """

    model: M
    validation: Validation
    optimizer: torch.optim.Optimizer

    def __init__(
        self, model: M, width: float, folder: str | Path | None, overwrite: bool, writes: bool
    ) -> None:
        self.model, self.average = model, Average(model, width)
        self.folder = None if folder is None else as_path(folder, "folder")
        self.overwrite, self.is_main = overwrite, writes
        self.step, self.elapsed = 0, 0.0
        self.history: list[tuple[int, float]] = []
        self._about: dict[str, Any] = {}
        self._owns_folder, self._holds_folder = False, False
        self._good: tuple[int, list[dict[str, Tensor]]] = (0, [])

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
        self.validation.losses = [(step, loss) for step, loss in state["validation"]]
        self.validation.best = state["best"]
        average = bare(self.average.module)
        if isinstance(average, ScoreNetwork):
            with suppress(CheckpointError):  # the model may be damaged: it is written anew
                average.tuned = load(self.folder, net=copy.deepcopy(average.net)).tuned

    def _keep(self) -> None:
        """Remember the weights as good."""
        states = (self.model.state_dict(), self.average.module.state_dict())
        self._good = (self.step, [{k: v.clone() for k, v in s.items()} for s in states])

    def _go_back(self) -> str:
        """To the last good weights, which are written; says what went wrong with that."""
        self.step, (model, average) = self._good
        self.average.steps = self.step
        self.model.load_state_dict(model)
        self.average.module.load_state_dict(average)
        if self.folder is not None and self.is_main:
            try:
                self._save_average(self.folder)
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
        average = self.average.module
        if known(bare(average)):
            with as_os_error(folder), self.validation.best_of(average):
                save(average, folder)

    def _state(self) -> dict[str, Any]:
        return {
            "run": self._about,
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "validation": [list(look) for look in self.validation.losses],
            "best": self.validation.best,
        }
