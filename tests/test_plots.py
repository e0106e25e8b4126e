"""What the figures hold, read back from them; how they look, people must judge."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from sde_gen import plots


def rendered(figure: Figure) -> Figure:
    file = io.BytesIO()
    figure.savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def log_density(x: torch.Tensor) -> torch.Tensor:
    """N((0.5, -0.25), diag(0.3, 0.15)^2)."""
    mean, std = torch.tensor([0.5, -0.25]), torch.tensor([0.3, 0.15])
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


def score(x: torch.Tensor) -> torch.Tensor:
    return -(x - torch.tensor([0.5, -0.25])) / torch.tensor([0.3, 0.15]) ** 2


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_puts_each_image_in_its_place(channels):
    x = torch.rand(5, channels, 8, 8) * 3 - 1.5
    figure = rendered(plots.image_grid(x, rows=2, labels=["a", 7], title="Digits"))
    (ax,) = figure.axes
    pixels = np.asarray(ax.images[0].get_array())
    assert pixels.shape == (2 * 9 + 1, 3 * 9 + 1, 3)
    for i, image in enumerate(x):
        top, left = 9 * (i // 3) + 1, 9 * (i % 3) + 1
        expected = ((image + 1) / 2).clamp(0, 1).expand(3, 8, 8).permute(1, 2, 0)
        assert pixels[top : top + 8, left : left + 8] == pytest.approx(expected.numpy())
    assert (pixels[:, 18:][10:] == 1).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "7"]
    assert ax.get_yticks().tolist() == [4.5, 13.5]
    assert ax.get_title() == "Digits"


def test_image_grid_is_about_square_and_draws_where_it_is_told():
    figure = plots.image_grid(torch.zeros(10, 1, 4, 4))
    assert figure.axes[0].images[0].get_array().shape[:2] == (3 * 5 + 1, 4 * 5 + 1)
    mine = Figure()
    ax = mine.subplots()
    assert plots.image_grid(torch.zeros(1, 1, 4, 4), ax=ax) is mine


def test_image_grid_is_checked():
    with pytest.raises(ValueError, match=r"x must be .*, got \(2, 4, 8, 8\)"):
        plots.image_grid(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"rows must lie in 1 .. 2, got 3"):
        plots.image_grid(torch.zeros(2, 1, 8, 8), rows=3)
    with pytest.raises(ValueError, match="labels must be one for each of 2 rows, got 1"):
        plots.image_grid(torch.zeros(2, 1, 8, 8), rows=2, labels=["a"])


def test_trajectories_in_one_dimension():
    times, paths = torch.tensor([1.0, 0.4, 0.0]), torch.randn(3, 50, 1)
    figure = rendered(plots.trajectories_1d(times, paths))
    left, ax, right = figure.axes
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    segments = np.stack(lines.get_segments())
    assert segments[..., 0] == pytest.approx(np.tile(times, (50, 1)))
    assert segments[..., 1] == pytest.approx(paths[..., 0].T.numpy())
    assert np.asarray(lines.get_array()) == pytest.approx(paths[-1, :, 0].numpy())
    assert ax.get_xlim() == (1, 0)
    for side, values in ((left, paths[0]), (right, paths[-1])):
        area = sum(bar.get_width() * bar.get_height() for bar in side.patches)
        assert area == pytest.approx(1)
        assert min(bar.get_y() for bar in side.patches) == pytest.approx(values.min().item())
    with pytest.raises(ValueError, match=r"expected times \(N,\) and paths \(N, B\), got \(2,\)"):
        plots.trajectories_1d(times[:2], paths)


def test_trajectories_in_the_plane():
    paths = torch.randn(4, 30, 2)
    (ax,) = rendered(plots.trajectories_2d(paths, shown=10)).axes
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert np.stack(lines.get_segments()) == pytest.approx(paths[:, :10].transpose(0, 1).numpy())
    ends = [
        np.asarray(c.get_offsets()) for c in ax.collections if not isinstance(c, LineCollection)
    ]
    assert ends[0] == pytest.approx(paths[0].numpy())
    assert ends[1] == pytest.approx(paths[-1].numpy())
    with pytest.raises(ValueError, match=r"paths must be \(N, B, 2\), got \(4, 30\)"):
        plots.trajectories_2d(paths[..., 0])


def test_density():
    figure = plots.density_2d(log_density, (-1, 2, -1, 1), torch.zeros(3, 2), resolution=101)
    ax = rendered(figure).axes[0]
    image = ax.images[0]
    assert (image.origin, tuple(image.get_extent())) == ("lower", (-1, 2, -1, 1))
    p = np.asarray(image.get_array())
    assert p.sum() * (3 / 101) * (2 / 101) == pytest.approx(1, abs=1e-3)
    row, column = np.unravel_index(p.argmax(), p.shape)
    assert (-1 + (column + 0.5) * 3 / 101) == pytest.approx(0.5, abs=3 / 101)
    assert (-1 + (row + 0.5) * 2 / 101) == pytest.approx(-0.25, abs=2 / 101)
    assert p.max() == pytest.approx(1 / (2 * math.pi * 0.3 * 0.15), rel=0.02)


def test_score_field():
    figure = rendered(plots.score_field(score, (-1, 2, -1, 1), log_density, arrows=9))
    ax = figure.axes[0]
    (field,) = (c for c in ax.collections if isinstance(c, Quiver))
    at = torch.tensor(field.get_offsets(), dtype=torch.float32)
    assert at.unique(dim=0).shape == (81, 2)
    s = score(at)
    size = s.norm(dim=1)
    shown = np.stack([field.U, field.V], axis=1)
    assert shown == pytest.approx((s / size[:, None]).numpy(), abs=1e-5)
    colour = np.asarray(field.get_array())
    most = size > size.quantile(0.05)
    assert colour[most] == pytest.approx(size[most].numpy(), rel=1e-5)


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"extent must be \(left, right, bottom, top\), rising"):
        plots.density_2d(log_density, (1, -1, 0, 1))
    with pytest.raises(ValueError, match=r"log_density must return \(100,\), got \(100, 2\)"):
        plots.density_2d(score, resolution=10)
    with pytest.raises(ValueError, match=r"score must return \(100, 2\), got \(100,\)"):
        plots.score_field(log_density, arrows=10)


def clock(scale: float) -> SimpleNamespace:
    """alpha = 1 - t/4, sigma = scale t."""
    return SimpleNamespace(
        T=2.0,
        alpha=lambda t: 1 - t / 4,
        sigma=lambda t: scale * t,
        log_snr=lambda t: 2 * torch.log((1 - t / 4) / (scale * t)),
    )


def test_noise_schedule():
    (one,) = {len(rendered(plots.noise_schedule(clock(1))).axes[0].lines)}
    assert one == 1
    figure = rendered(plots.noise_schedule({"VP": clock(1), "VE": clock(20)}, n=10))
    t = np.arange(1, 11) / 5
    for scale, i in ((1, 0), (20, 1)):
        alpha, sigma, log_snr = (ax.lines[i].get_ydata() for ax in figure.axes)
        assert figure.axes[0].lines[i].get_xdata() == pytest.approx(t / 2)
        assert alpha == pytest.approx(1 - t / 4)
        assert sigma == pytest.approx(scale * t)
        assert log_snr == pytest.approx(2 * np.log(alpha / sigma))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["VP", "VE"]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log", "linear"]


def test_no_figure_is_anybodys_global_state():
    code = """
import sys, torch
from sde_gen import plots
assert "matplotlib" not in sys.modules
plots.image_grid(torch.zeros(4, 1, 8, 8))
plots.trajectories_1d([0, 1], torch.randn(2, 9))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_density_over_time_shows_the_law_and_the_paths() -> None:
    def moving(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(t, 0.2).log_prob(x[:, 0])

    times = torch.linspace(1, -1, 11)
    paths = times[:, None, None] + 0.1 * torch.randn(11, 60, 1)
    ax = rendered(plots.density_over_time(moving, times, paths, (-2, 2), shown=7)).axes[0]
    image = np.asarray(ax.images[0].get_array())
    ridge = (image.argmax(0) + 0.5) / image.shape[0] * 4 - 2
    assert np.abs(ridge - np.linspace(1, -1, image.shape[1])).max() < 0.02
    assert len(ax.lines) == 7
    assert np.allclose(ax.lines[3].get_ydata(), paths[:, 3, 0].numpy())
    with pytest.raises(ValueError, match="rising"):
        plots.density_over_time(moving, times, extent=(1, 1))
    with pytest.raises(ValueError, match="one state a time"):
        plots.density_over_time(moving, times, paths[:5])


def test_movie_holds_a_frame_a_state(tmp_path: Path) -> None:
    from PIL import Image

    paths = torch.zeros(5, 1, 2) + torch.linspace(-1, 1, 5)[:, None, None]
    movie = plots.movie_2d(paths, captions=list("abcde"), groups=torch.tensor([1]), fps=10)
    movie.save(tmp_path / "movie.gif")
    red = np.array([int(plots.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    columns = []
    with Image.open(tmp_path / "movie.gif") as picture:
        assert picture.n_frames == 5
        for i in range(5):
            picture.seek(i)
            pixels = np.asarray(picture.convert("RGB")).astype(int)
            columns.append(np.nonzero(np.abs(pixels - red).max(-1) < 60)[1].mean())
    assert np.all(np.diff(columns) > 20), "the point moves to the right"
    assert 'src="data:image/gif;base64,' in movie._repr_html_()
    with pytest.raises(ValueError, match="captions"):
        plots.movie_2d(paths, captions=["one"])
    with pytest.raises(ValueError, match=r"\(N, B, 2\)"):
        plots.movie_2d(paths[0])
