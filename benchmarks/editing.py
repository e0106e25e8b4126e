"""What the probability flow makes of held-out digits: the picture of the documentation.

Rows: ten test digits; the same encoded and decoded; decoded as the next digit (``relabel``);
noised to two levels and denoised (``redraw``); and each on its way to the next one of its class
(``interpolate``, half way on the sphere). Prints the largest error of the round trip.
"""

from __future__ import annotations

import argparse

import torch
from _problems import HERE
from trained_digits import network

from sde_gen import data
from sde_gen.likelihood import decode, encode, interpolate, redraw, relabel
from sde_gen.plots import image_grid


def main() -> None:
    """Train or load, edit, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.25, help="of training")
    parser.add_argument("--quick", action="store_true", help="6 seconds of training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = network(0.1 if args.quick else args.minutes)
    test, y = data.digits("test"), torch.arange(10)
    first, second = (
        torch.stack([test.x[(test.y == k).nonzero()[i, 0]] for k in range(10)]) for i in (0, 1)
    )
    model, shifted = net.given(y=y), net.given(y=(y + 1) % 10)
    back = decode(model, encode(model, first))
    print(f"encode and decode: largest error {float((back - first).abs().max()):.1e}")
    rows = [first, back, relabel(model, shifted, first)]
    rows += [redraw(model, first, level) for level in (0.5, 1.5)]
    rows += [interpolate(model, first, second, [0.5])[0], second]
    labels = ["test", "back", "next digit", "redrawn, 0.5", "redrawn, 1.5", "half way", "other"]
    figure = image_grid(torch.cat(rows), rows=len(rows), labels=labels)
    name = "editing_quick.png" if args.quick else "editing.png"
    folder = HERE / "results" if args.quick else HERE.parent / "docs" / "images"
    figure.savefig(folder / name, dpi=110)
    print(f"wrote {folder / name}")


if __name__ == "__main__":
    main()
