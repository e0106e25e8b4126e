"""Where Gaussian increments come from.

A ``Noise`` answers one question: which standard normal drives sample i between the times t and s?
The answer is a pure function of (seed, sample, interval), computed by a counter-based generator
(Philox4x64-10, Salmon et al. 2011). Hence a sample does not depend on its batch, on chunks, on
the device or on who asked first, and no global generator is touched.

- ``Streams``: independent increments, one stream a sample.
- ``BrownianPath``: one Brownian path a sample, the same path however finely it is read.
- ``Impulses``: unit impulses, which turn a linear sampler into its exact transfer coefficients.
- ``Scaled``: another noise times a number.
"""

from __future__ import annotations

from .path import BrownianPath
from .philox import philox
from .streams import Impulses, Noise, Scaled, Source, Streams, normal_like

__all__ = [
    "BrownianPath",
    "Impulses",
    "Noise",
    "Scaled",
    "Source",
    "Streams",
    "normal_like",
    "philox",
]
