"""What the examples in docstrings run with: `torch`, `sg`, and an empty folder to write into."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _an_example(request: pytest.FixtureRequest) -> None:
    """Each docstring begins with the imports of the documentation and the same random numbers."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import torch

    import sde_gen

    names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
    names.update(torch=torch, sg=sde_gen)
    torch.manual_seed(0)
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    monkeypatch.chdir(request.getfixturevalue("tmp_path"))
