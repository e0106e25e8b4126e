"""The whole library in one command: train on handwritten digits, draw new ones, judge them."""

from __future__ import annotations

from .judge import Judge
from .run import demo

__all__ = ["Judge", "demo"]
