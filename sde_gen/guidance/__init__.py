"""Guidance: scores that are made of others, and which law they sample.

Densities multiply, so scores add. By Bayes' rule an unconditional score plus the gradient of a
classifier of *noisy* data is exactly the conditional score. Any other power makes a sum that is no
longer the score of a noised law: noising and multiplying do not commute. What then comes out is
known for Gaussians, and corrected by ``Product``, by ``Tempered`` and, for any data, by
``inverse.corrected``, whose draws become exact as their number and its steps grow.

- ``score + (1 + gamma) * Classifier(net, y, sde)``: Dhariwal & Nichol 2021, algorithm 1.
- ``ClassifierFree(score, weight, y=labels)``, ``Composed(score, [(w, conditions), ...])``.
- ``autoguidance(score, weak, weight)``: away from a weaker model, Karras et al. 2024.
- ``Interval(sde, low, high, weight)``, ``AtLevel(sde, f)``: weights by sigma / alpha.
- ``Tempered(score, a)``: p^a. ``Product([(score, a), ...])``, ``Mixture``: of experts.
"""

from __future__ import annotations

from .classifier import Classifier, classifier_loss
from .conditions import ClassifierFree, Composed
from .experts import Mixture, Product, Tempered, autoguidance
from .levels import AtLevel, Interval

__all__ = [
    "AtLevel",
    "Classifier",
    "ClassifierFree",
    "Composed",
    "Interval",
    "Mixture",
    "Product",
    "Tempered",
    "autoguidance",
    "classifier_loss",
]
