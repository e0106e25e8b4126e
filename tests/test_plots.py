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
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from scipy.stats import kstest

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


@pytest.mark.parametrize(("n", "size"), [(4, 256), (3, 64), (400, 8), (1, 5)])
def test_image_grid_shows_every_pixel(n, size):
    """Each image stands in the file as it is, enlarged by a whole number."""
    from PIL import Image

    x = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(n))
    file = io.BytesIO()
    rows = math.isqrt(n)
    figure = plots.image_grid(x.to(torch.uint8), labels=range(rows), title="All")
    figure.savefig(file)
    picture = np.array(Image.open(file).convert("RGB")).astype(int)
    (ax,) = figure.axes
    columns, gap = -(-n // rows), max(1, round(size / 16))
    zoom = max(1, round(min(90, 1800 / columns) / size))
    box = ax.get_window_extent()
    left, top = round(box.x0), round(len(picture) - box.y1)
    for i in {0, n // 2, n - 1}:
        wanted = x[i].movedim(0, -1).numpy().repeat(zoom, 0).repeat(zoom, 1)
        up = top + zoom * (gap + i // columns * (size + gap))
        on = left + zoom * (gap + i % columns * (size + gap))
        found = picture[up : up + len(wanted), on : on + len(wanted)]
        assert np.abs(found - wanted).max() <= 1
    assert max(picture.shape) < 2200


def test_image_grid_takes_bytes_and_tells_of_what_it_clips():
    def pixels(x, **options):
        (ax,) = rendered(plots.image_grid(x, **options)).axes
        return np.asarray(ax.images[0].get_array()), ax.get_xlabel()

    levels = torch.tensor([0, 51, 255, 204]).reshape(1, 1, 2, 2)
    for given in (levels.to(torch.uint8), levels.numpy().astype(np.uint8), levels / 127.5 - 1):
        tile, note = pixels(given)
        assert tile[1:3, 1:3, 0] == pytest.approx(np.array([[0, 0.2], [1, 0.8]]), abs=1e-6)
        assert note == ""
    x = torch.tensor([-1.04, 1.0, 3.5, math.nan]).repeat_interleave(4).reshape(4, 1, 2, 2)
    assert pixels(x)[1] == "0.33 of the values lie outside [-1, 1], up to 3.5"


def test_rows_of_an_image_grid_may_differ_in_length():
    parts = [torch.full((k, 1, 4, 4), v) for k, v in ((2, -1.0), (3, 0.0), (0, 0.0))]
    (ax,) = rendered(plots.image_grid(parts, labels="abc")).axes
    tile = np.asarray(ax.images[0].get_array())[..., 0]
    places = [[tile[5 * r + 1, 5 * c + 1] for c in range(3)] for r in range(3)]
    assert places == [[0, 0, 1], [0.5, 0.5, 0.5], [1, 1, 1]]
    assert ax.get_title() == ""
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a list of rows has 3 of them"):
        plots.image_grid(parts, rows=3)
    with pytest.raises(ValueError, match=r"got \(2, 1, 5, 4\)"):
        plots.image_grid([parts[0], torch.zeros(2, 1, 5, 4)])


def test_each_image_of_a_grid_can_have_a_name():
    (ax,) = rendered(plots.image_grid(torch.zeros(6, 1, 8, 8), labels="abcdef")).axes
    at = {t.get_text(): t.get_position() for t in ax.texts}
    assert list(at) == list("abcdef")
    assert at["a"][0] == at["d"][0] == 4.5
    assert at["a"][1] == at["c"][1] > 8
    tile = np.asarray(ax.images[0].get_array())[..., 0]
    step = (len(tile) - 1) // 2
    assert (tile[9:step] == 1).all()  # where the names stand
    assert (tile[step + 1 : step + 9, 1:9] == 0.5).all()


def test_signals_stand_in_their_panels():
    x = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0))
    x[3, 1, 2] = math.nan
    at = torch.linspace(0, 3, 7)
    figure = rendered(
        plots.signals(x, at, labels=["up", "down"], channels=["u", "v"], title="Two")
    )
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 5
    for i, ax in enumerate(panels):
        assert len(ax.lines) == (0 if i == 3 else 2)
        for c, line in enumerate(ax.lines):
            assert line.get_ydata() == pytest.approx(x[i, c].double().numpy())
            assert line.get_xdata() == pytest.approx(at.double().numpy())
    assert [ax.get_ylabel() for ax in panels] == ["up", "", "", "down", ""]
    assert figure.get_suptitle() == "Two\n1 of 5 signals left out: NaN or infinity"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["u", "v"]
    one = plots.signals(x[:3, 0], labels="abc", rows=1)
    assert [ax.get_title() for ax in one.axes] == ["a", "b", "c"]
    assert one.axes[1].lines[0].get_xdata().tolist() == list(range(7))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"x": torch.zeros(3)}, r"x must be \(N, C, L\) or \(N, L\), got \(3,\)"),
        ({"at": [0, 1]}, r"at must be \(4,\) beside this x, finite, got \(2,\)"),
        ({"rows": 3}, r"rows must lie in 1 .. 2, got 3"),
        ({"labels": "abc"}, "labels must be one for each of 1 rows, got 3"),
        ({"channels": "ab"}, "channels must be one for each of 1 channels, got 2"),
        ({"x": torch.full((2, 4), math.nan)}, "all 2 have NaN"),
    ],
)
def test_signals_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        plots.signals(**{"x": torch.zeros(2, 4), **options})


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


NOTE = "2 of 30 paths left out: NaN or infinity"


def damaged_paths() -> tuple[torch.Tensor, torch.Tensor]:
    """Paths (4, 30, 2) of which two are not finite, and which are."""
    paths = torch.randn(4, 30, 2, generator=torch.Generator().manual_seed(0))
    paths[2, 5, 1], paths[3, 17, 0] = math.nan, -math.inf
    good = torch.ones(30, dtype=torch.bool)
    good[[5, 17]] = False
    return paths, good


def segments(ax: Axes) -> np.ndarray:
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    return np.stack(lines.get_segments())


def test_paths_that_are_not_finite_are_left_out_and_counted() -> None:
    paths, good = damaged_paths()
    times = torch.linspace(1, 0, 4)
    figure = rendered(plots.trajectories_1d(times, paths[..., 1:], "mine"))
    left, ax, right = figure.axes
    kept = torch.isfinite(paths[..., 1]).all(0)
    assert ax.get_title() == "mine\n1 of 30 paths left out: NaN or infinity"
    assert segments(ax)[..., 1] == pytest.approx(paths[:, kept, 1].T.numpy())
    for side, values in ((left, paths[0, kept, 1]), (right, paths[-1, kept, 1])):
        assert min(bar.get_y() for bar in side.patches) == pytest.approx(values.min().item())
    (ax,) = rendered(plots.trajectories_2d(paths)).axes
    assert ax.get_title() == NOTE
    assert segments(ax) == pytest.approx(paths[:, good].transpose(0, 1).numpy())
    ends = [c.get_offsets() for c in ax.collections if not isinstance(c, LineCollection)]
    assert np.asarray(ends[1]) == pytest.approx(paths[-1, good].numpy())

    def law(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(t, 0.2).log_prob(x[:, 0])

    (ax,) = rendered(plots.density_over_time(law, times, paths[..., 0])).axes
    assert ax.get_title() == "1 of 30 paths left out: NaN or infinity"
    kept = torch.isfinite(paths[..., 0]).all(0)
    drawn = np.stack([line.get_ydata() for line in ax.lines])
    assert drawn == pytest.approx(paths[:, kept, 0].T.numpy())
    ax = rendered(plots.density_2d(log_density, points=paths[3])).axes[0]
    assert ax.get_title() == "1 of 30 points left out: NaN or infinity"
    (points,) = ax.collections
    assert np.asarray(points.get_offsets()) == pytest.approx(np.delete(paths[3].numpy(), 17, 0))
    assert plots.trajectories_2d(paths[:, good]).axes[0].get_title() == ""


def test_where_nothing_is_finite_it_is_said() -> None:
    nan = torch.full((3, 4, 2), math.nan)
    for call in (
        lambda: plots.trajectories_1d([0, 1, 2], nan[..., 0]),
        lambda: plots.trajectories_2d(nan),
        lambda: plots.movie_2d(nan),
        lambda: plots.density_over_time(lambda x, t: x[:, 0], [0, 1, 2], nan[..., 0]),
    ):
        with pytest.raises(ValueError, match="paths: all 4 have NaN or infinity"):
            call()
    with pytest.raises(ValueError, match="log_density has NaN or infinity everywhere"):
        plots.density_2d(lambda x: x[:, 0] * math.nan)
    with pytest.raises(ValueError, match="scores: all 625 have NaN"):
        plots.score_field(lambda x: x * math.nan)


def test_fields_that_are_not_finite_somewhere() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, :1] < 0, math.nan, score(x))

    def log_bad(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0] < 0, math.inf, log_density(x))

    figure = rendered(plots.score_field(bad, (-1, 1, -1, 1), log_bad, arrows=10))
    (field,) = (c for c in figure.axes[0].collections if isinstance(c, Quiver))
    assert len(field.get_offsets()) == 50
    assert (np.asarray(field.get_offsets())[:, 0] > 0).all()
    assert figure.axes[0].get_title() == "50 of 100 scores left out: NaN or infinity"
    image = rendered(plots.density_2d(log_bad, (-1, 1, -1, 1), resolution=10)).axes[0].images[0]
    assert np.isnan(np.asarray(image.get_array().filled(math.nan))[:, :5]).all()
    assert np.isfinite(np.asarray(image.get_array())[:, 5:]).all()


def test_images_that_are_not_finite_leave_their_places_white() -> None:
    x = torch.zeros(4, 1, 4, 4)
    x[1, 0, 2, 3], x[2, 0, 0, 0] = math.nan, math.inf
    (ax,) = rendered(plots.image_grid(x, rows=2)).axes
    pixels = np.asarray(ax.images[0].get_array())[..., 0]
    assert ax.get_title() == "2 of 4 images left out: NaN or infinity"
    places = [pixels[r : r + 4, c : c + 4] for r in (1, 6) for c in (1, 6)]
    assert [set(place.ravel().tolist()) for place in places] == [{0.5}, {1.0}, {1.0}, {0.5}]


def test_movies_leave_out_paths_that_are_not_finite() -> None:
    from PIL import Image

    paths = torch.zeros(3, 2, 2) + torch.linspace(-1, 1, 3)[:, None, None]
    paths[1, 0, 0] = math.nan
    movie = plots.movie_2d(paths.tolist(), captions="abc", groups=[2, 1], fps=10)
    with Image.open(io.BytesIO(movie.gif)) as picture:
        assert picture.n_frames == 3
        for i in range(3):
            picture.seek(i)
            pixels = np.asarray(picture.convert("RGB")).astype(int)
            counts = []
            for name in (plots.COLOURS[1], plots.COLOURS[2]):
                colour = [int(name[k : k + 2], 16) for k in (1, 3, 5)]
                counts.append((np.abs(pixels - colour).max(-1) < 60).sum())
            assert counts[0] > 0, "the finite point, in the colour of its own group"
            assert counts[1] == 0


def test_arrays_and_lists_are_drawn_as_tensors_are() -> None:
    def same(a: Figure, b: Figure) -> bool:
        files = []
        for figure in (a, b):
            files.append(io.BytesIO())
            figure.savefig(files[-1], format="raw", dpi=40)
        return files[0].getvalue() == files[1].getvalue()

    x, paths, times = torch.rand(4, 3, 5, 5), torch.randn(3, 6, 2), torch.tensor([1.0, 0.5, 0.0])
    two = np.int64(2)
    assert same(plots.image_grid(x, 2), plots.image_grid(x.numpy(), two))
    assert same(
        plots.image_grid(x, 2, ["a", "b"]), plots.image_grid(x.tolist(), two, np.array(["a", "b"]))
    )
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist):
        t, p = kind(times), kind(paths)
        assert same(plots.trajectories_2d(paths, 2), plots.trajectories_2d(p, two))
        line = kind(paths[..., 0])
        assert same(plots.trajectories_1d(times, paths[..., 0]), plots.trajectories_1d(t, line))
        mine = plots.density_2d(log_density, points=kind(paths[0]), resolution=np.int32(9))
        assert same(plots.density_2d(log_density, points=paths[0], resolution=9), mine)
    array = plots.density_2d(lambda x: log_density(x).numpy(), np.array([-1, 1, -1, 1]))
    assert same(plots.density_2d(log_density, (-1, 1, -1, 1)), array)


FINE_FPS = 1.5
BAD_PLOTS = {
    "x": lambda bad: plots.image_grid(bad),
    "rows": lambda bad: plots.image_grid(torch.zeros(4, 1, 4, 4), rows=bad),
    "times": lambda bad: plots.trajectories_1d(bad, torch.zeros(2, 3)),
    "paths": lambda bad: plots.trajectories_2d(bad),
    "shown": lambda bad: plots.trajectories_2d(torch.zeros(2, 3, 2), bad),
    "points": lambda bad: plots.density_2d(log_density, points=bad),
    "resolution": lambda bad: plots.density_2d(log_density, resolution=bad),
    "log_density": lambda bad: plots.density_2d(bad),
    "score": lambda bad: plots.score_field(bad),
    "arrows": lambda bad: plots.score_field(score, arrows=bad),
    "extent": lambda bad: plots.score_field(score, bad),
    "ax": lambda bad: plots.trajectories_2d(torch.zeros(2, 3, 2), ax=bad),
    "fps": lambda bad: plots.movie_2d(torch.zeros(2, 3, 2), fps=(bad, 1e9)[bad is FINE_FPS]),
    "groups": lambda bad: plots.movie_2d(torch.zeros(2, 3, 2), groups=bad),
    "captions": lambda bad: plots.movie_2d(torch.zeros(3, 3, 2), captions=bad),
    "sdes": lambda bad: plots.noise_schedule(bad),
    "n": lambda bad: plots.noise_schedule(clock(1), bad),
}


@pytest.mark.parametrize("name", BAD_PLOTS)
@pytest.mark.parametrize(
    "bad", [1j, np.ones(2, complex), -1, FINE_FPS, math.nan, object(), [[1], [2, 3]]]
)
def test_plots_refuse_by_name(name: str, bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        BAD_PLOTS[name](bad)


def test_rank_curves_are_the_distribution_less_the_even_one_within_kolmogorovs_bound():
    u = np.array([[0.1, 0.7], [0.4, 0.2], [0.9, 0.5], [0.3, 0.3]])
    (ax,) = rendered(plots.rank_curves({"ranks": u, "TARP": u[:, 0]}, size=0.03)).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ranks", "TARP"]
    for column, line in zip([u[:, 0], u[:, 1], u[:, 0]], ax.lines[1:], strict=True):
        x, y = line.get_data()
        for at, off in zip(x, y, strict=True):
            assert off == pytest.approx((column <= at).mean() - at, abs=1e-12)
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    # Three curves share the chance: each has a third of it.
    assert kstest([band.y1], "kstwo", args=(4,)).statistic == pytest.approx(0.99)
    assert band.y0 == pytest.approx(-band.y1)


@pytest.mark.parametrize(
    ("ranks", "error", "said"),
    [
        ([0.1, 0.2], TypeError, "ranks must be given by name"),
        ({}, TypeError, "ranks must be given by name"),
        ({"a": [0.1, 1.2]}, ValueError, r"ranks\['a'\] must be \(R,\) or \(R, P\) in \[0, 1\]"),
        ({"a": [0.1, math.nan]}, ValueError, r"in \[0, 1\]"),
        (
            {"a": [0.1], "b": [0.1, 0.2]},
            ValueError,
            r"ranks must be of one number R, got \[1, 2\]",
        ),
    ],
)
def test_rank_curves_say_what_is_wrong(ranks, error, said):
    with pytest.raises(error, match=said):
        plots.rank_curves(ranks)


# --- runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 30, 1000])
def test_a_loss_curve_shows_every_look_and_their_means(n):
    history = [(10 * i, 1 / i) for i in range(1, n + 1)]
    (axes,) = plots.loss_curve(history, [(10, 2.0), (20, math.nan)]).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["loss"], history)
    np.testing.assert_allclose(lines["validation"], [[10, 2.0]])
    if n < 100:
        assert set(lines) == {"loss", "validation"}
    else:
        blocks = np.array(history).reshape(50, -1, 2).mean(1)
        np.testing.assert_allclose(lines["its mean"], blocks)
        assert axes.get_yscale() == "log"


def test_a_loss_curve_needs_a_loss():
    with pytest.raises(ValueError, match="one finite loss"):
        plots.loss_curve([(1, math.nan)])
