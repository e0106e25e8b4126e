"""What every test starts from: a fixed seed, one thread, float32, no window."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype"


def pytest_make_parametrize_id(val: object) -> str | None:
    """A name that all workers agree on: no address of an object stands in it."""
    if isinstance(val, types.FunctionType):
        return val.__name__
    return type(val).__name__ if " at 0x" in repr(val) else None
