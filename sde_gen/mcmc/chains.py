"""What a run of chains gives back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of many chains, and how they fared.

    Attributes:
        samples: (draws, chains, *D); a chain that diverged is NaN throughout.
        h: step size of each chain, after the warm-up (chains,).
        diverged: which chains left every bound (chains,), bool.
        acceptance: mean acceptance probability after the warm-up (chains,), for MALA.
        velocity: the last velocity (chains, *D), in the coordinates in which the preconditioner
            is I, for the underdamped methods.

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, noise=0).diverged
    tensor([False, False, False, False])
    """

    samples: Tensor
    h: Tensor
    diverged: Tensor
    acceptance: Tensor | None = None
    velocity: Tensor | None = None

    def to_arviz(self, name: str = "x") -> Any:
        """The chains that did not diverge as ``arviz.InferenceData``, variable ``name``.

        ArviZ then has split R-hat (``arviz.rhat``), effective sample sizes (``arviz.ess``), all
        together (``arviz.summary``) and pictures (``arviz.plot_autocorr``). A warning tells of
        chains that stand still, for which such numbers mean nothing.

        Raises:
            ImportError: ArviZ is not installed.
        """
        try:
            with warnings.catch_warnings():
                # ArviZ announces its next version on every import.
                warnings.simplefilter("ignore", FutureWarning)
                import arviz
        except ImportError as error:
            raise ImportError(
                "the diagnostics of chains are ArviZ's: pip install 'sde-gen[mcmc]'"
            ) from error
        kept = ~self.diverged
        # numpy has no bfloat16, and ArviZ sums: half precision would not do.
        dtype = torch.promote_types(self.samples.dtype, torch.float32)
        draws = self.samples[:, kept].transpose(0, 1).to("cpu", dtype).numpy()
        still = (draws == draws[:, :1]).all(1).reshape(len(draws), -1).any(1)
        if still.any():
            warnings.warn(
                f"{still.sum()} of {len(draws)} chains never move in some coordinate: R-hat and"
                " effective sizes mean nothing there",
                RuntimeWarning,
                stacklevel=2,
            )
        stats = None
        if self.acceptance is not None:
            rate = self.acceptance[kept].unsqueeze(1).expand(draws.shape[:2])
            stats = {"acceptance_rate": rate.cpu().numpy()}
        return arviz.from_dict(posterior={name: draws}, sample_stats=stats)

    def __repr__(self) -> str:
        draws, chains, *shape = self.samples.shape
        text = f"Chains({draws} draws of {chains} chains in {tuple(shape)}"
        if self.acceptance is not None:
            text += f", acceptance {float(torch.nanmean(self.acceptance)):.3f}"
        return f"{text}, {int(self.diverged.sum())} diverged)"
