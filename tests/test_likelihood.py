"""Likelihoods against exact densities, at the solver's order; bits against masses of cells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import problems
import pytest
import torch

import sde_gen as sg
from sde_gen import grids
from sde_gen.likelihood import bits_per_dim, density, log_prob
from sde_gen.networks import MLP

F64 = torch.float64
VP = sg.VP()
POINT = sg.Gaussian(VP, torch.tensor([1.0, 0.0]), 0.5)
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], dtype=torch.float64)
SDES = [sg.VP(), sg.SubVP(), sg.VE(), sg.EDM(80.0), sg.OrnsteinUhlenbeck()]


def mixture(sde):
    return sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)


class Own(sg.Score):
    """A score of VP that is a function of one's own."""

    sde = VP

    def __init__(self, f):
        self.f = f

    def __call__(self, x, t):
        return self.f(x, t)


def points(score, n):
    x = score.sample(n, torch.Generator().manual_seed(0)).clone()
    x[0] *= 5  # a point in the tail, where the density is about e^-200
    return x


@pytest.mark.parametrize("solver", [sg.SciPy("DOP853", 1e-10, 1e-10), sg.Adaptive(1e-8, 1e-8)])
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_equals_exact_density(sde, solver):
    score = mixture(sde)
    x = points(score, 8)
    fine = log_prob(score, x, solver=solver).value
    # Some 50 steps of Adaptive, each to 1e-8 of a root mean square of about 10.
    torch.testing.assert_close(fine, score.log_prob(x), atol=5e-6, rtol=0)


CLOCKS = [
    VP,
    sg.VP(sg.schedules.Geometric()),
    sg.VP(sg.schedules.Linear(beta_max=1e4)),
    sg.OrnsteinUhlenbeck(-200.0),
]


@pytest.mark.parametrize("sde", CLOCKS, ids=["VP", "geometric", "long", "fast"])
@pytest.mark.parametrize("probes", [None, 1])
def test_the_default_solver_where_hardly_any_signal_is_left(sde, probes):
    """Noise / signal is up to exp(2500). On independent coordinates one probe is exact."""
    law = sg.Gaussian(
        sde, torch.tensor([1.0, 0.0, -0.5], dtype=F64), torch.tensor([0.3, 0.6, 1.2])
    )
    x = law.sample(5, torch.Generator().manual_seed(0))
    found = log_prob(law, x, probes=probes).value
    # Some 20 steps to 1e-5, or 15 to 1e-4, of a root mean square of about 3.
    atol = 1e-3 if probes is None else 5e-3
    torch.testing.assert_close(found, law.log_prob(x), atol=atol, rtol=0)


def test_error_falls_at_the_order_of_the_solver():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 16)
    errors = []
    for n in (60, 120, 240):
        times = grids.uniform(sde, n, end=0.0, power=2).flip(0)
        l_n = log_prob(score, x, solver=sg.RungeKutta(), times=times).value
        errors.append(float((l_n - score.log_prob(x)).abs().mean()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(s - 4) < 0.35 for s in slopes[:-1]), slopes
    assert abs(slopes[-1] - 4) < 0.2, slopes


@pytest.mark.parametrize("probes", [None, 1])
def test_a_sample_does_not_depend_on_its_neighbours_or_on_chunks(probes):
    """A far outlier among 3,000 makes no difference but rounding, nor does its absence."""
    x = 0.5 + torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[100] = 30.0
    among = log_prob(POINT, x, probes=probes).value
    alone = log_prob(POINT, x[:1], probes=probes).value
    torch.testing.assert_close(alone, among[:1], rtol=0, atol=1e-10)
    chunked = log_prob(POINT, x, probes=probes, chunk=np.int64(700)).value
    torch.testing.assert_close(chunked, among, rtol=0, atol=1e-10)
    score = mixture(VP)
    x = points(score, 6)
    whole, parts = (log_prob(score, x, probes=probes, chunk=c).value for c in (None, 4))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def all_signs(x, probes, seed):
    """Every sign vector in the plane, up to the common sign, which does not matter."""
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)[:, None].expand(2, len(x), 2)


@pytest.mark.parametrize("solver", [None, sg.Adaptive(1e-4, 1e-4)], ids=["fixed", "adaptive"])
def test_probes_never_choose_a_step(monkeypatch, solver):
    """So the mean over all probes, each in its own run, is the run with all of them: unbiased."""
    score = mixture(VP)
    x = points(score, 8)
    runs = []
    for pick in (slice(0, 1), slice(1, 2)):
        found = {"orthogonal_signs": lambda *a, pick=pick: all_signs(*a)[pick]}
        monkeypatch.setattr(density, "orthogonal_signs", found["orthogonal_signs"])
        runs.append(log_prob(score, x, probes=1, solver=solver).value)
    one, other = runs
    assert float((one - other).abs().max()) > 0.1
    both = (one + other) / 2
    if solver is None:
        exact = log_prob(score, x, steps=56).value
        torch.testing.assert_close(both, exact, rtol=0, atol=1e-10)
    # Steps of 1e-4; the point far out, whose logarithm is -200, costs relatively as much.
    torch.testing.assert_close(both, score.log_prob(x), rtol=1e-3, atol=5e-3)


APART = sg.MatrixOrnsteinUhlenbeck(((-1.0, 0.0), (0.0, -0.5)), ((1.0, 0.0), (0.0, 0.8)))


@pytest.mark.parametrize("sde", [VP, sg.EDM(80.0), APART], ids=["VP", "EDM", "matrix"])
@pytest.mark.parametrize("probes", [None, 1])
def test_a_state_at_rest_is_integrated_too(sde, probes):
    """At the mean of the data nothing moves, but the density changes. One probe is exact here."""
    covariance = torch.diag(torch.tensor([0.09, 1.44], dtype=F64))
    x = torch.zeros(1, 2, dtype=F64)
    score = sg.CorrelatedMixture(sde, torch.ones(1), x, covariance)
    found = log_prob(score, x, probes=probes).value
    torch.testing.assert_close(found, score.log_prob(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [None, sg.Adaptive(), sg.SciPy(), sg.RungeKutta(), sg.Heun()])
@pytest.mark.parametrize("probes", [None, 1])
def test_a_score_that_is_not_finite_stops_at_its_first_call(solver, probes):
    class Bad(sg.Score):
        sde, facts, calls = VP, sg.Facts((2,)), 0

        def __call__(self, x, t):
            self.calls += 1
            return x * math.nan

    bad = Bad()
    with pytest.raises(FloatingPointError, match="score"):
        log_prob(bad, torch.ones(3, 2), solver=solver, probes=probes)
    with pytest.raises(FloatingPointError, match="score"):
        bits_per_dim(bad, torch.ones(3, 2, dtype=torch.int64), solver=solver, probes=probes)
    assert bad.calls == 2

    def late(x, t):
        return torch.where(torch.as_tensor(t).reshape(-1, 1) > 0.5, math.inf, -x)

    def steep(x, t):
        return -x.abs().sqrt()

    with pytest.raises(FloatingPointError, match="score"):
        log_prob(Own(late), torch.ones(3, 2), solver=solver, probes=probes)
    with pytest.raises(FloatingPointError, match="divergence"):
        log_prob(Own(steep), torch.zeros(3, 2), solver=solver, probes=probes)


def test_a_lifted_network_ends_in_the_prior():
    sde = sg.CriticallyDamped()
    inner = sg.Gaussian(sg.EDM(300.0), torch.zeros(2), 1.0)

    class Network(sg.Score):
        sde, facts = inner.sde, sg.Facts((2,))

        def __call__(self, x, t):
            return inner(x, t)

    exact, learned = sg.Lifted(inner, sde), sg.Lifted(Network(), sde)
    assert hasattr(exact, "log_prob")
    assert not hasattr(learned, "log_prob")
    x = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    loose = sg.Adaptive(1e-2, 1e-2)
    a, b = (log_prob(score, x, solver=loose).value for score in (exact, learned))
    # p_T differs from the prior by what is left of the data, exp(-4) of it.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


def test_a_flow_that_starts_late_gives_the_density_of_blurred_data():
    x = POINT.sample(5, torch.Generator().manual_seed(0))
    found = log_prob(POINT, x, times=[0.3, 1.0]).value
    w = float(VP.sigma(0.3) / VP.alpha(0.3)) ** 2
    blurred = sg.Gaussian(VP, POINT.mean, math.sqrt(0.25 + w)).log_prob(x)
    torch.testing.assert_close(found, blurred, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "steps", "tolerance"),
    [(problems.mixture, 24, 1e-3), (problems.ring, 48, 1e-4), (problems.line, 20, 3e-3)],
)
def test_costs_less_than_scipy_for_the_same_error(make, steps, tolerance):
    """Two fifths of the calls for the value; two thirds with those that its bias takes."""
    law = make(sg.EDM(80.0))
    x = law.sample(64, torch.Generator().manual_seed(0))
    exact = law.log_prob(x)
    ours = log_prob(law, x, steps=steps)
    theirs = log_prob(law, x, solver=sg.SciPy("RK45", tolerance, tolerance))
    assert steps + 1 <= 0.42 * theirs.calls
    assert ours.calls <= 0.72 * theirs.calls
    assert problems.rms(ours.value - exact) <= problems.rms(theirs.value - exact)


def test_encode_then_decode_returns_the_data():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 32)[1:]
    flow = sde.probability_flow(score)
    solver = sg.SciPy("DOP853", 1e-10, 1e-10)
    latent = sg.solve(flow, x, [0.0, 1.0], solver)
    back = sg.solve(flow, latent, [1.0, 0.0], solver)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_images_and_vectors_agree():
    sde = sg.VP()
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    flat = sg.Gaussian(sde, torch.zeros(12, dtype=torch.float64), 0.5)
    image = sg.Gaussian(sde, torch.zeros(3, 2, 2, dtype=torch.float64), 0.5)
    a = log_prob(flat, x).value
    b = log_prob(image, x.reshape(3, 3, 2, 2)).value
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a, flat.log_prob(x), atol=1e-2, rtol=0)


def test_guided_scores_have_a_likelihood():
    # Exact unconditional score + exact classifier = the class's own score, hence its density.
    sde = sg.VP()
    score = mixture(sde)

    class Posterior(torch.nn.Module):
        def forward(self, x, c):
            t = sde.time_at(-8 * c.double())
            return torch.log(score.posterior(x, t))

    guided = score + sg.Classifier(Posterior(), 1, sde)
    one = sg.Gaussian(sde, MEANS[1], 0.2)
    x = one.sample(4, torch.Generator().manual_seed(2))
    fast = sg.SciPy("DOP853", 1e-8, 1e-8)
    times = [1e-4, 1.0]
    a = log_prob(guided, x, solver=fast, times=torch.tensor(times, dtype=torch.float64)).value
    b = one.log_prob(x)
    # The prior N(0, 1) in place of p_T, and a start at t = 1e-4: both below 1e-2 here.
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


def cells(std, levels):
    """Masses of the cells of N(0, std^2), and Gauss-Legendre points in each (levels, 40)."""
    edges = torch.linspace(-1, 1, levels + 1, dtype=F64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    x = edges[:-1, None] + (nodes + 1) / levels
    log_p = -0.5 * (x / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
    return torch.special.ndtr(edges / std).diff(), log_p, weights / 2


def test_one_draw_costs_the_mean_over_the_cell():
    """-log2 of the mass, and Jensen's gap: E over the cell of -log p, by quadrature."""
    std, levels, n, rows = 0.4, 5, 8, 400
    _, log_p, weight = cells(std, levels)
    mean = log_p @ weight
    variance = (log_p - mean[:, None]).square() @ weight
    k = torch.arange(n) % levels
    exact = -float(mean[k].mean()) / math.log(2) + math.log2(levels / 2)
    error = math.sqrt(float(variance[k].sum()) / rows) / (n * math.log(2))
    model = sg.Gaussian(VP, torch.zeros(n), std)
    found = bits_per_dim(model, k.expand(rows, n), levels).value
    assert found.shape == (rows,)
    # A standard error of 0.006 bits; the flow is solved to some 1e-4.
    assert abs(float(found.mean()) - exact) < 4 * error + 1e-3
    # The spread over the cells is that of quadrature, to 4 / sqrt(2 * 400).
    assert float(found.std()) == pytest.approx(error * math.sqrt(rows), rel=0.15)


@pytest.mark.parametrize("draws", [1, 3, 16])
def test_the_mean_over_draws_is_the_mass_of_the_cell(draws):
    """2^(-n bits) is an unbiased estimate of P(k), for any number of draws."""
    std, levels, rows = 0.2, 4, 3000
    mass, log_p, weight = cells(std, levels)
    model = sg.Gaussian(VP, torch.zeros(1), std)
    for level in (0, 1):
        bits = bits_per_dim(
            model, torch.full((rows, 1), level), levels, draws=draws, probes=None, seed=level
        ).value
        p = log_p[level].exp()
        mean = float(p @ weight)
        error = math.sqrt(float((p - mean).square() @ weight) / (rows * draws)) / mean
        exact = float(mass[level])
        assert mean * 2 / levels == pytest.approx(exact, rel=1e-12)
        # Relative errors of 0.5 to 3 %; the flow is solved to some 1e-4.
        assert float((2**-bits).mean()) == pytest.approx(exact, rel=4 * error + 1e-3)


def test_the_noise_of_a_sample_does_not_depend_on_the_batch():
    k = torch.tensor([[0, 3, 7], [1, 2, 5], [6, 6, 0]])
    damped = sg.CriticallyDamped()
    for model in (
        sg.Gaussian(VP, torch.zeros(3), 0.5),
        sg.CorrelatedMixture(damped, torch.ones(1), torch.zeros(1, 3), 0.3 * torch.eye(3)),
    ):

        def bits(k, model=model, **options):
            # One step from end to end: what is looked at is the noise.
            return bits_per_dim(model, k, 8, solver=sg.RungeKutta(), **options).value

        whole = bits(k, seed=2)
        torch.testing.assert_close(bits(k[:1], seed=2), whole[:1])
        torch.testing.assert_close(bits(k, seed=2, chunk=2), whole)
        assert float((bits(k, seed=3) - whole).abs().max()) > 1e-3
        assert len(bits(k[:1].expand(4, 3)).unique()) == 4


@pytest.mark.parametrize("make", [np.asarray, np.ndarray.tolist, lambda k: k.astype(np.uint8)])
def test_levels_are_arrays_or_lists_and_counts_are_numpys(make):
    k = np.array([[0, 3], [1, 2]])
    expected = bits_per_dim(POINT, torch.from_numpy(k), 4, draws=2, probes=None, seed=1).value
    one, two, four = np.int64(1), np.uint8(2), np.int32(4)
    found = bits_per_dim(POINT, make(k), four, draws=two, probes=None, seed=one, chunk=one).value
    torch.testing.assert_close(found, expected)
    x = torch.zeros(3, 2)
    torch.testing.assert_close(
        log_prob(POINT, x, probes=two, seed=one).value,
        log_prob(POINT, x, probes=2, seed=1).value,
    )


def test_no_global_generator_is_read():
    before = torch.get_rng_state()
    k = torch.zeros(2, 2, dtype=torch.int64)
    log_prob(POINT, torch.zeros(2, 2), probes=1)
    bits_per_dim(POINT, k, 4)
    damped = sg.CriticallyDamped()
    lifted = sg.Lifted(sg.Gaussian(sg.EDM(300.0), torch.zeros(2)), damped)
    bits_per_dim(lifted, k, 4, solver=sg.Adaptive(1e-2, 1e-2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_score_bound_for_other_samples_is_refused_before_it_is_cut():
    """Six labels for four samples, in chunks of two."""
    model = sg.ScoreNetwork(MLP((2,), 8, 1, classes=3), VP).eval().given(y=torch.arange(6) % 3)
    for chunk in (None, 2):
        with pytest.raises(ValueError, match="bound for 6 samples, x has 4"):
            log_prob(model, torch.zeros(4, 2), chunk=chunk)
        with pytest.raises(ValueError, match="bound for 6 samples, x has 4"):
            bits_per_dim(model, torch.zeros(4, 2, dtype=torch.int64), chunk=chunk)


RISE = r"times must rise from the data to T = 1\.0"


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 0.3], RISE),
        ([1.0, 0.0], RISE),
        ([0.0, 0.5, 0.2, 1.0], RISE),
        ([-0.1, 1.0], RISE),
        ([0.0, 1.5], RISE),
        ([0.0], r"times must be a 1-D grid of two or more, got shape \(1,\)"),
        ([[0.0, 1.0]], r"times must be a 1-D grid of two or more, got shape \(1, 2\)"),
        ([0.0, math.nan], "times has 1 NaN or infinite values of 2"),
    ],
)
def test_a_grid_that_does_not_rise_to_the_known_law_is_refused(times, message):
    for score in (POINT, Own(lambda x, t: POINT(x, t))):
        with pytest.raises(ValueError, match=message):
            log_prob(score, torch.zeros(2, 2), times=times)


def test_bad_input():
    score = mixture(VP)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        log_prob(score, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.complex64"):
        log_prob(score, torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="NaN"):
        log_prob(score, torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), .* got \(2,\)"):
        log_prob(score, torch.zeros(2))
    with pytest.raises(ValueError, match=r"x must have shape \(B, \*D\), .* got \(2,\)"):
        log_prob(Own(lambda x, t: -x), torch.zeros(2))
    with pytest.raises(ValueError, match="reads the score at t = 0, where it is singular"):
        log_prob(sg.ScoreNetwork(MLP((2,), 8, 1), VP), torch.zeros(2, 2), times=[0.0, 1.0])
    for probes in (0, 1.5, True):
        with pytest.raises(ValueError, match="probes must be an integer >= 1"):
            log_prob(score, torch.zeros(2, 2), probes=probes)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        log_prob(score, torch.zeros(2, 2), probes=1, seed=1.5)
    with pytest.raises(ValueError, match="steps are those of the default"):
        log_prob(score, torch.zeros(2, 2), steps=20, solver=sg.Heun())


@pytest.mark.parametrize(
    ("levels", "options", "error", "message"),
    [
        (
            torch.zeros(2, 2),
            {},
            TypeError,
            r"levels must be integers 0 \.\. 255, got torch.float32",
        ),
        (torch.zeros(2, 2, dtype=torch.complex64), {}, TypeError, "levels must be real"),
        ([[True, False]], {}, TypeError, "levels must be integers"),
        ([0, 1], {}, ValueError, r"levels must be \(B, \*D\)"),
        ([[16, 0]], {"n_levels": 16}, ValueError, r"0 \.\. 15, got 0 \.\. 16"),
        ([[0, -1]], {}, ValueError, r"got -1 \.\. 0"),
        ([[0, 1]], {"n_levels": 1}, ValueError, "n_levels must be an integer >= 2"),
        ([[0, 1]], {"draws": 0}, ValueError, "draws must be an integer >= 1"),
        ([[0, 1]], {"draws": 2, "probes": 1}, ValueError, "draws = 2 with probes = 1 is no bound"),
        ([[0, 1]], {"seed": "a"}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_levels(levels, options, error, message):
    with pytest.raises(error, match=message):
        bits_per_dim(POINT, levels, **options)
    with pytest.raises(TypeError, match=r"knows its process \(.sde\)"):
        bits_per_dim(sg.Score(), [[0]])
