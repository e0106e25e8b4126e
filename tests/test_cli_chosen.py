"""What `sde-gen train` chooses for a device, and says first."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sde_gen.cli.chosen import choose_size, chosen
from sde_gen.cli.commands import _network
from sde_gen.networks import UNet


def sized(shape, device, channels=None, batch=None) -> tuple[int | None, int]:
    options = Namespace(channels=channels, batch=batch)
    choose_size(options, shape, device)
    return options.channels, options.batch


def operations(net: UNet, shape: tuple[int, ...], batch: int) -> int:
    """Of a step, forward and back, counted by PyTorch on tensors without values."""
    with FlopCounterMode(display=False) as counter:
        x, c = torch.empty(batch, *shape, device="meta"), torch.empty(batch, device="meta")
        net.to("meta")(x, c).sum().backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def reference() -> int:
    """0.56 s on two cores, measured."""
    return operations(UNet((1, 28, 28), 32, (1, 2, 2), blocks=1), (1, 28, 28), 64)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 96, 128), (2, 500), (1, 12, 12, 12)], ids=str)
def test_two_cores_take_a_step_a_second(shape, reference):
    """Counted in operations. Volumes, whose convolutions are of another kind, may take twice as
    long."""
    channels, batch = sized(shape, "cpu")
    net = _network(Namespace(x=torch.empty(2, *shape), y=None, table=None), channels)
    seconds = 0.56 * operations(net, shape, batch) / reference
    assert seconds < (2 if len(shape) == 4 else 1)
    assert seconds > 0.05 or batch == 256


@pytest.mark.parametrize(
    ("shape", "device", "given", "found"),
    [
        ((3, 32, 32), "cpu", {}, (32, 64)),
        ((3, 64, 64), "cpu", {}, (16, 64)),
        ((3, 1024, 1024), "cpu", {}, (16, 8)),
        ((3, 32, 32), "cpu", {"channels": 64}, (64, 16)),
        ((3, 32, 32), "cpu", {"batch": 5}, (32, 5)),
        ((3, 32, 32), "cuda", {}, (None, 256)),
        ((13,), "cpu", {}, (None, 256)),
        ((1, 8, 8), "cpu", {}, (None, 256)),
    ],
)
def test_what_is_left_open_is_filled_in(shape, device, given, found):
    assert sized(shape, device, **given) == found


def test_the_first_line_says_what_was_chosen_and_how_to_change_it():
    text = chosen(UNet((1, 8, 8), 8, (1, 1), blocks=0, width=16), 64, "cpu")
    size = sum(p.numel() for p in UNet((1, 8, 8), 8, (1, 1), blocks=0, width=16).parameters())
    assert text == (
        f"a U-Net of {size:,} parameters (--channels), 64 samples a step (--batch), on cpu"
        " (--device)"
    )
