from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import F64
from scipy.stats import kstest

from sde_gen import BrownianPath, Impulses, Noise, Streams
from sde_gen.noise import philox

ROWS = [Streams, BrownianPath]
every_kind = pytest.mark.parametrize("kind", ROWS, ids=lambda k: k.__name__)


def state(n: int, *shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.zeros(n, *shape, dtype=dtype)


@every_kind
def test_draws_are_standard_normal(kind: type[Noise]) -> None:
    n = 50_000
    z = kind(3)(state(n // 10, 10), 0.7, 0.2).flatten()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert float(z.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    # Kolmogorov-Smirnov: exceeded once in a thousand times.
    assert kstest(z.numpy(), "norm").statistic < 1.95 / math.sqrt(n)


def test_bits_are_those_of_philox() -> None:
    """Random123's known answer; and tensors, which make them on a GPU, against numpy in C."""
    counter = torch.arange(20)
    word = [f"{int(w) & (1 << 64) - 1:016x}" for w in philox(counter, (0, 0))[0]]
    assert word == ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]
    key = (12345, (1 << 64) - 7)
    # numpy steps its counter before it draws: started at 0 it begins with the block of 1.
    reference = np.random.Philox(counter=0, key=key[0] | key[1] << 64).random_raw(4 * 19)
    ours = philox(counter[1:], key).flatten().numpy().view(np.uint64)
    assert (ours == reference).all()


def test_draws_of_different_names_are_independent() -> None:
    n, x = 20_000, state(20_000, 2)
    draws = [
        Streams(1)(x, 0.7, 0.2),
        Streams(2)(x, 0.7, 0.2),
        Streams(1)(x, 0.7, 0.2, 1),
        Streams(1)(x, 0.2, 0.7),
        Streams(1)(x, 0.7, 0.1),
        Streams(1)(x, 0.7 + 1e-15, 0.2),
        Streams(1, samples=n)(x, 0.7, 0.2),
        Streams(1).start(x),
        Streams(1 + (1 << 40))(x, 0.7, 0.2),
    ]
    z = torch.cat(draws, 1)
    correlation = z.T @ z / n - torch.eye(z.shape[1], dtype=F64)
    # 171 distinct entries of spread 1 / sqrt(n) (diagonal: sqrt 2 more).
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(n)


@every_kind
def test_a_sample_has_its_own_stream(kind: type[Noise]) -> None:
    whole = kind(5)(state(7, 3, 2), 0.9, 0.4)
    assert torch.equal(kind(5)(state(4, 3, 2), 0.9, 0.4), whole[:4])
    assert torch.equal(kind(5, samples=4)(state(3, 3, 2), 0.9, 0.4), whole[4:])
    chosen = torch.tensor([6, 0, 3])
    assert torch.equal(kind(5, samples=chosen)(state(3, 3, 2), 0.9, 0.4), whole[chosen])
    assert torch.equal(kind(5).start(state(7, 3))[chosen], kind(5, chosen).start(state(3, 3)))
    assert len(whole.flatten().unique()) == whole.numel()


@every_kind
@pytest.mark.parametrize(
    "index",
    [
        slice(2, 5),
        slice(None, 3),
        slice(4, None),
        torch.tensor([5, 1]),
        torch.tensor([True, False, True, False, False, True]),
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [0, 10, torch.tensor([9, 8, 2, 4, 1, 0])], ids=str)
def test_rows_select_the_same_noise(
    kind: type[Noise], index: slice | torch.Tensor, samples: torch.Tensor | int
) -> None:
    noise = kind(2, samples)
    whole = noise(state(6, 2), 0.5, 0.1)
    part = noise.rows(index)(state(len(whole[index]), 2), 0.5, 0.1)
    assert torch.equal(part, whole[index])
    twice = noise.rows(slice(1, 6)).rows(slice(2, 4))
    assert torch.equal(twice(state(2, 2), 0.5, 0.1), whole[3:5])


@every_kind
def test_no_global_generator_is_touched_or_read(kind: type[Noise]) -> None:
    before = torch.get_rng_state()
    one = kind(0)(state(3, 2), 0.5, 0.1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(kind(0)(state(3, 2), 0.5, 0.1), one)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_numbers_in_every_dtype_and_shape(kind: type[Noise], dtype: torch.dtype) -> None:
    whole = kind(1)(state(3, 12), 0.5, 0.1)
    cast = kind(1)(state(3, 12, dtype=dtype), 0.5, 0.1)
    assert cast.dtype == dtype
    rounding = torch.finfo(dtype).eps * (300 if kind is BrownianPath else 4)
    torch.testing.assert_close(cast.double(), whole, rtol=0, atol=rounding)
    image = kind(1)(state(3, 3, 2, 2), 0.5, 0.1)
    assert torch.equal(image.flatten(1), whole)
    odd = kind(1)(state(3, 5), 0.5, 0.1)
    assert odd.shape == (3, 5)


@every_kind
@pytest.mark.parametrize("seed", [0.5, True, "1", None])
def test_a_seed_is_an_integer(kind: type[Noise], seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        kind(seed)  # type: ignore[call-arg]


def test_numbered_samples_must_fit_the_state() -> None:
    with pytest.raises(ValueError, match="noise for 2 samples, state of 3"):
        Streams(0, torch.tensor([1, 2]))(state(3, 1), 0.5, 0.1)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e-30, 1e-60, 1e30])
def test_brownian_covariance(unit: float) -> None:
    """E[W_s W_t] = min(s, t) for each sample, and scaling: W(c t) / sqrt(c) is one too."""
    n, times = 20_000, torch.tensor([0.02, 0.1, 0.1003, 0.5, 1.0, 7.0, 90.0], dtype=F64)
    times = unit * times
    path = BrownianPath(1)
    w = torch.cat([path.at(state(n, 1), float(t)) for t in times], 1)
    exact = torch.minimum(times[:, None], times[None, :])
    spread = torch.sqrt((exact**2 + times[:, None] * times[None, :]) / n)
    assert float(((w.T @ w / n - exact) / spread).abs().max()) < 4.5
    assert float((w.mean(0) / torch.sqrt(times / n)).abs().max()) < 4
    assert bool((path.at(state(4, 2), 0.0) == 0).all())


class Shallow(BrownianPath):
    """Leaves of an eighth: nearly every time is bridged inside one."""

    depth = 2


@pytest.mark.parametrize("each", [False, True], ids=["one time", "a time each"])
def test_a_leaf_is_an_exact_bridge(each: bool) -> None:
    """Var W(t) = t inside a leaf, off its middle too, and Cov with its ends is min(s, t)."""
    n, path = 20_000, Shallow(4)
    for t in (0.02, 0.1, 0.24, 0.3, 0.9):
        times = torch.full((n,), t, dtype=F64)
        w = path.at(state(n, 1), times if each else t).flatten()
        assert float(w.var() / t) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
        for end in (0.25, 0.5, 1.0):
            w_end = path.at(state(n, 1), end).flatten()
            exact = min(t, end)
            spread = math.sqrt((exact**2 + t * end) / n)
            assert abs(float((w * w_end).mean()) - exact) < 4 * spread


def test_a_time_for_each_sample_reads_the_same_path() -> None:
    x, path = state(6, 2), BrownianPath(9, torch.tensor([5, 0, 3, 3, 11, 2]))
    times = torch.tensor([0.3, 0.0, 64.0, 0.3001, 128.0, 1e-7], dtype=F64)
    together = path.at(x, times)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(path.at(x, t)[i], together[i], rtol=1e-13, atol=1e-13)


def test_brownian_increments_are_normalised_both_ways() -> None:
    path, x = BrownianPath(3), state(5, 2)
    w_t, w_s = path.at(x, 0.3), path.at(x, 0.8)
    torch.testing.assert_close(path(x, 0.3, 0.8), (w_s - w_t) / math.sqrt(0.5))
    torch.testing.assert_close(path(x, 0.8, 0.3), (w_s - w_t) / math.sqrt(0.5))


def test_a_refined_path_is_the_same_path() -> None:
    x, fine = state(4, 3), torch.linspace(1.0, 0.0, 65, dtype=F64).tolist()
    path = BrownianPath(2)
    parts = [path(x, t, s) * math.sqrt(t - s) for t, s in pairwise(fine)]
    for stride in (2, 8, 64):
        coarse = fine[::stride]
        for i, (t, s) in enumerate(pairwise(coarse)):
            whole = BrownianPath(2)(x, t, s) * math.sqrt(t - s)
            joined = torch.stack(parts[i * stride : (i + 1) * stride]).sum(0)
            torch.testing.assert_close(whole, joined, rtol=0, atol=1e-12)


def test_a_path_does_not_depend_on_who_asked_first() -> None:
    x, times = state(3, 2), [0.31, 0.7, 0.313, 0.05, 90.0, 0.31, 0.3130001]
    forward, backward = BrownianPath(8), BrownianPath(8)
    one = [forward.at(x, t) for t in times]
    two = [backward.at(x, t) for t in reversed(times)][::-1]
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_quadratic_variation_is_time() -> None:
    times = torch.linspace(0.2, 1.2, 201, dtype=F64).tolist()
    path, x = BrownianPath(0), state(8, 1)
    w = torch.stack([path.at(x, t) for t in times])
    variation = (w.diff(dim=0) ** 2).sum(0).mean()
    assert float(variation) == pytest.approx(1, abs=4 * math.sqrt(2 / (200 * 8)))


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_increments_are_those_of_a_path_down_to_its_resolution(
    unit: float, dtype: torch.dtype
) -> None:
    """Unit variance, and neighbours without correlation; what is shorter is refused."""
    n, path = 4000, BrownianPath(7)
    x = state(n, 1, dtype=dtype)
    for t in (0.3, 0.5, 0.999999, 1.7):
        for h in (0.1, 1e-3, 1.1 * path.resolution):
            at = [unit * t * u for u in (1 - 2 * h, 1 - h, 1)]
            z = torch.cat([path(x, *at[:2]), path(x, *at[1:])], 1).double()
            error = z.T @ z / n - torch.eye(2, dtype=F64)
            # float32 knows W to 1e-7 of its size, which is sqrt(1 / h) increments.
            rounding = 0.0 if dtype == F64 else 4e-7 / h**0.5
            assert float(error.abs().max()) < 4.5 * math.sqrt(2 / n) + rounding
        with pytest.raises(ValueError, match="cannot be read in steps as short as from"):
            path(x, unit * t, unit * t * (1 + 0.9 * path.resolution))
    with pytest.raises(ValueError, match="cannot be read"):
        path(x, unit, unit)


@pytest.mark.parametrize("t", [-0.1, 1e39, math.nan])
def test_a_path_has_ends(t: float) -> None:
    with pytest.raises(ValueError, match="path lives on"):
        BrownianPath(0).at(state(1, 1), t)


def test_impulses_number_the_draws() -> None:
    noise, x = Impulses(), state(3, 2)
    assert [noise(x, 0.5, 0.1).sum(1).tolist() for _ in range(2)] == [[2, 0, 0], [0, 2, 0]]
    assert bool((noise.start(x) == 0).all())
    noise(x, 0.5, 0.1)
    with pytest.raises(ValueError, match="more draws than rows"):
        noise(x, 0.5, 0.1)
    with pytest.raises(TypeError, match="do not chunk"):
        noise.rows(slice(0, 2))


def test_named_uniforms_are_numpys_philox() -> None:
    import hashlib

    x = torch.empty(3, 5, dtype=torch.float64)
    u = Streams(7, 11).uniform(x, "flip")
    stream = int.from_bytes(hashlib.blake2b(b"flip", digest_size=8).digest(), "little")
    # A sample of five words takes two blocks of four; numpy counts one before it draws.
    for row, sample in zip(u, range(11, 14), strict=True):
        words = np.random.Philox(counter=2 * sample - 1, key=7 | stream << 64).random_raw(8)[:5]
        np.testing.assert_array_equal(row.numpy(), (words >> np.uint64(11)) * 2.0**-53)
    single = Streams(7, 11).uniform(x.float(), "flip")
    assert bool(((u - single) >= 0).all())
    assert bool(((u - single) < 2**-24).all())


def test_named_draws_follow_the_sample_and_differ_by_name() -> None:
    x = torch.empty(6, 4)
    noise = Streams(1)
    for draw in (noise.uniform, noise.normal):
        whole = draw(x, "a")
        part = getattr(noise.rows(slice(2, 5)), draw.__name__)(x[:3], "a")
        assert torch.equal(whole[2:5], part)
        assert not torch.equal(whole, draw(x, "b"))


def test_spread_times_are_even_and_uniform() -> None:
    n = 4096
    for first in (0, 10**12):
        u = Streams(5, first).spread(n)
        gaps = torch.cat([u.sort().values, u.min()[None] + 1]).diff()
        # Three lengths, the largest at most phi^2 / n (n between Fibonacci numbers).
        assert len(torch.unique((gaps * 1e9).round())) <= 3
        assert float(gaps.max()) < 2.62 / n
    # Over seeds each number is uniform: mean 1/2 with standard error 1 / sqrt(12 * 4000).
    first = torch.stack([Streams(s, 3).spread(1)[0] for s in range(4000)])
    assert abs(float(first.mean()) - 0.5) < 4 / (12 * 4000) ** 0.5
