# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Is my posterior calibrated?
#
# **Something was measured, and a sampler shows what it may have been. May you believe its
# spread?**
#
# A sharp picture made of a blurred one is easily admired and hardly ever checked. Here the prior
# is a mixture in the plane, so everything that is estimated elsewhere is known: the posterior, the
# term that all methods approximate, and the evidence. Then we take the exact answer away, and test
# the samplers by what is left.
#
# *Needs `sde-gen[data]` and nothing else; runs in a minute on one CPU core.*

# %% tags=["hide-input"] jupyter={"source_hidden": true}
# Where sde_gen is missing it is installed: from this checkout, or else from the package index.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("sde_gen") is None:
    source = ".." if Path("../setup.cfg").exists() else "sde-gen"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{source}[data]"], check=True)

# %%
# %matplotlib inline
import math
import warnings

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import sde_gen as sg
from sde_gen import inverse, plots
from sde_gen.metrics import sliced_wasserstein

torch.set_default_dtype(torch.float64)
warnings.simplefilter("ignore", RuntimeWarning)  # small numbers of particles are on purpose

# %% [markdown]
# ## An inverse problem
#
# Of $x\in\mathbb R^2$ one weighted sum is measured, with noise: $o=Ax+n$, $n\sim N(0,s^2)$. One
# number cannot tell two, so there is no inverse; there is a law of what $x$ may be. Bayes' rule:
#
# $$p(x\mid o)=\frac{p(x)\,N(o;Ax,s^2)}{p(o)}.$$
#
# $p(o)$ is the *evidence*: how well this prior explains that measurement.

# %%
sde = sg.VP()
angle = torch.tensor([20.0, 80.0, 150.0, 215.0, 320.0]).deg2rad()
means = torch.stack([angle.cos(), angle.sin()], 1)
stds = torch.tensor([[0.12, 0.2], [0.2, 0.12], [0.12, 0.2], [0.2, 0.12], [0.12, 0.12]])
law = sg.GaussianMixture(sde, [0.3, 0.25, 0.2, 0.15, 0.1], means, stds)
data = law.sample(20_000, torch.Generator().manual_seed(0))
prior = law.with_facts(sg.Facts.of(data, rank=2))  # what one knows of any data: their covariance

A, s = inverse.Matrix(torch.tensor([[1.0, 0.4]])), 0.1
seen = inverse.Observation(A, torch.tensor([0.7]), s)
posterior = inverse.exact_posterior(law, seen)  # a mixture of Gaussians again
evidence = inverse.log_evidence(law, seen)

x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
bayes = law.log_prob(x, 0.0) + seen.log_likelihood(x) - evidence
error = float((posterior.log_prob(x, 0.0) - bayes).abs().max())
print(f"log p(o) = {float(evidence):.4f}; Bayes' rule holds to {error:.0e}")
assert error < 1e-9

extent = (-1.7, 1.7, -1.7, 1.7)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=120)
panels = {
    "what was known: $p(x)$": lambda x: law.log_prob(x.double(), 0.0),
    "what was measured: $N(o;Ax,s^2)$": lambda x: seen.log_likelihood(x.double()),
    "what is known: $p(x|o)$": lambda x: posterior.log_prob(x.double(), 0.0),
}
for ax, (title, log_density) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    plots.density_2d(log_density, extent, title=title, ax=ax)
figure

# %% [markdown]
# ## The term that nobody has
#
# A diffusion model draws from $p(x)$ by its scores. For the posterior it needs those of
# $p_t(x\mid o)$, and Bayes' rule at time $t$ has one more term:
#
# $$\nabla\log p_t(x\mid o)=\nabla\log p_t(x)+\nabla\log p(o\mid x_t=x),\qquad
#   p(o\mid x_t)=\int N(o;Ax_0,s^2)\;p(x_0\mid x_t)\,\mathrm dx_0 .$$
#
# The likelihood is known of clean data, not of noisy ones. The integral asks for the whole law of
# what a noisy state may have come from; a network tells its mean $D=E[x_0\mid x_t]$ and no more.
#
# Here that law is known as well, because noising is itself an observation:
# $x_t/\alpha=x_0+\sqrt w\,z$ with $w=(\sigma/\alpha)^2$.

# %%
t = torch.tensor(0.33)
alpha, w = sde.alpha(t), (sde.sigma(t) / sde.alpha(t)) ** 2
x_t = alpha * torch.tensor([[0.15, 0.1]])
noisy = inverse.Observation(inverse.Matrix(torch.eye(2)), x_t / alpha, float(w.sqrt()))
origin = inverse.exact_posterior(law, noisy)  # p(x_0 | x_t)
weights = origin.log_weights.exp()
D = law.denoise(x_t, t)
print("D =", D[0].tolist(), " mean of p(x_0 | x_t) =", (weights @ origin.means).tolist())
assert torch.allclose(D[0], weights @ origin.means)

# %% [markdown]
# ## All terms differ in one matrix
#
# So the law is replaced by a Gaussian, $p(x_0\mid x_t)\approx N(D,C_t)$, and the integral becomes
#
# $$\nabla\log p(o\mid x_t)\approx J^\top A^\top(A\,C_tA^\top+S)^{-1}(o-A D),\qquad
#   J=\partial D/\partial x .$$
#
# Published methods with names of their own differ in what they take for $C_t$: DPS nothing at all,
# $C_t=0$; ΠGDM $\frac{w}{1+w}I$, as if the data were $N(0,I)$; moment matching (MMPS) the true
# covariance, which is $\frac{\sigma^2}{\alpha}J$. The covariance of the data gives
# $(C^{-1}+I/w)^{-1}$. If the data *are* Gaussian the last two are exact:

# %%
RULES = {
    "DPS": inverse.Point(),
    "ΠGDM": inverse.pigdm(),
    "data covariance": inverse.DataCovariance(jacobian=True),
    "moment matching": inverse.Tweedie(1),  # one product suffices for one measurement
}
gaussian = sg.Gaussian(sde, torch.zeros(2), covariance=torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
wanted = inverse.exact_posterior(gaussian, seen)(x, 0.4)
of_gaussian = {}
for name, rule in RULES.items():
    found = inverse.Posterior(gaussian, seen, rule)(x, 0.4)
    of_gaussian[name] = float((found - wanted).norm() / wanted.norm())
    print(f"{name:16s} error on Gaussian data {of_gaussian[name]:.0e}")
assert max(of_gaussian["data covariance"], of_gaussian["moment matching"]) < 1e-8
assert min(of_gaussian["DPS"], of_gaussian["ΠGDM"]) > 0.01

# %% [markdown]
# Our data are no Gaussian. On the left is $p(x_0\mid x_t)$ of one state, and what each rule takes
# it for (ellipses of two standard deviations); even the right covariance puts most of its mass
# where nothing is. On the right is what that costs: the error of the term, in units of the term.

# %%
C = prior.facts.moments.basis @ torch.diag(prior.facts.moments.values[1:])
C = C @ prior.facts.moments.basis.T
away = origin.means - D
within = (weights[:, None, None] * origin.covariances).sum(0)
shapes = {
    "DPS": torch.zeros(2, 2),
    "ΠGDM": w / (1 + w) * torch.eye(2),
    "data covariance": torch.linalg.inv(torch.linalg.inv(C) + torch.eye(2) / w),
    "moment matching": within + (away.T * weights) @ away,
}
colours = dict(zip(RULES, plots.COLOURS[1:], strict=False))

times = torch.linspace(0.02, 0.9, 23)
draws = posterior.sample(1000, torch.Generator().manual_seed(2))
errors = {name: [] for name in RULES}
for u in times:
    y = sde.perturb(draws, u, torch.Generator().manual_seed(3))[0]
    exact, free = posterior(y, u), law(y, u)
    for name, rule in RULES.items():
        found = inverse.Posterior(prior, seen, rule)(y, u)
        errors[name].append(float((found - exact).norm() / (exact - free).norm()))
assert min(errors["DPS"][1:]) > 1  # worse than no term at all
assert max(errors["moment matching"][:3]) < 0.35
assert min(max(e) for e in errors.values()) > 0.3

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 4), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
plots.density_2d(
    lambda x: origin.log_prob(x.double(), 0.0), extent, title="what $x_t$ may come from", ax=left
)
for name, c in shapes.items():
    values, vectors = torch.linalg.eigh(c)
    wide, high = 4 * values.clamp_min(2e-4).sqrt()
    turn = math.degrees(torch.atan2(vectors[1, 0], vectors[0, 0]))
    left.add_patch(
        Ellipse(D[0].tolist(), wide, high, angle=turn, fc="none", ec=colours[name], lw=2)
    )
for name, values in errors.items():
    right.plot(times, values, label=name, color=colours[name], lw=2)
right.set(yscale="log", xlabel="time $t$", title="error of the term / the term", xlim=(0, 0.9))
right.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.7))
figure

# %% [markdown]
# Small noise is where moment matching is right: the state has chosen its mode, and there the law
# is Gaussian. At large noise all are wrong, and that is where a run decides *which* mode it
# enters.

# %% [markdown]
# ## Particles, and the evidence
#
# The way out does not need a better term. Run many states at once, by any such term, and keep
# account of what it gets wrong: at each step a particle's weight is multiplied by what the step
# ought to have been over what it was. Where weights have become uneven, heavy particles are copied
# and light ones dropped. In the limit of many particles the draws are exact *for any term*; a bad
# term costs particles, not truth (`inverse.particles` takes the covariance of the data). And the
# mean weights multiply up to the evidence.

# %%
COUNT, STEPS = 1500, 60
found = inverse.particles(prior, seen, COUNT, STEPS, seed=0, dtype=torch.float64)
samples = {
    name: sg.sample(
        inverse.Posterior(prior, seen, rule), COUNT, STEPS, 0, eta=1.0, dtype=torch.float64
    )
    for name, rule in RULES.items()
}
samples["particles"] = found.draw(COUNT)

g = torch.Generator().manual_seed(4)
reference = posterior.sample(8000, g)
fresh = [posterior.sample(COUNT, g) for _ in range(8)]
floor = sum(sliced_wasserstein(y, reference, 64) for y in fresh) / len(fresh)
distance = {name: sliced_wasserstein(y, reference, 64) / floor for name, y in samples.items()}
corner = (-0.4, 1.5, -1.5, 1.4)
u, v = (torch.linspace(corner[i], corner[i + 1], 160) for i in (0, 2))
mesh = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)
density = posterior.log_prob(mesh.reshape(-1, 2), 0.0).exp().reshape(160, 160)
print("distances to the posterior, in those of as many exact draws:")
print({name: round(d, 1) for name, d in distance.items()})
assert distance["particles"] < 2.5
assert min(d for name, d in distance.items() if name != "particles") > 3

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(13, 3.1), layout="constrained", dpi=120)
for ax, (name, y) in zip(figure.subplots(1, 5, sharey=True), samples.items(), strict=True):
    ax.contourf(u, v, density.sqrt(), 12, cmap="Greys", alpha=0.75)
    ax.scatter(*y.T, s=2, color=plots.COLOURS[1], alpha=0.5, lw=0)
    ax.set(title=f"{name}: {distance[name]:.1f}", aspect="equal", xlim=corner[:2], ylim=corner[2:])
figure

# %% [markdown]
# Grey is the exact posterior. Its modes all agree with the measurement, and the terms find them,
# but in the wrong proportions, where nobody could tell from a picture. Now the evidence, by
# sixty-four runs of each size:

# %%
sizes = (40, 160, 640)
same = inverse.Observation(A, seen.y.expand(64, 1), s)  # a row a run
runs = {
    n: inverse.particles(prior, same, n, 80, seed=5, dtype=torch.float64).log_evidence - evidence
    for n in sizes
}
for n, off in runs.items():
    mean, se = off.exp().mean(), off.exp().std() / 8
    rms = float(off.square().mean().sqrt())
    print(f"{n:4d} particles: error {rms:.3f} nats, estimate / p(o) {mean:.3f} +- {se:.3f}")
    assert abs(mean - 1) < 4 * se + 0.03
rms = {n: float(off.square().mean().sqrt()) for n, off in runs.items()}
assert rms[640] < rms[40] / 2

# %% [markdown]
# The estimate of $p(o)$ is right on average for *any* number of particles (but for what eighty
# steps leave out), and its error falls like $1/\sqrt N$: sixteen times as many, a quarter of the
# error.

# %% [markdown]
# ## Without the exact answer
#
# A network has no closed-form posterior to compare with. But we can still play the measurement
# ourselves. Draw a truth $x^*$ from the prior (of a model: held-out data), measure it, and sample.
# Given $o$, the truth is one more draw from $p(x\mid o)$, no different from those of a right
# sampler. So the **rank** of any function of $x^*$ among its draws is uniform: exactly, for any
# number of draws, any problem. Too many ranks at the ends: the sampler is too sure. A heap in the
# middle: too unsure. A slope: biased.
#
# `calibrate` takes ranks along random projections, and around random points (TARP), the coverage
# of intervals, and whether the misfits $|o-Ax|^2/s^2$ have their chi-square law.

# %%
R, S = 800, 15
g = torch.Generator().manual_seed(6)
truths = law.sample(R, g)
many = inverse.Observation(A, A.forward(truths) + s * torch.randn(R, 1, generator=g), s)


def by_particles(o):
    return inverse.particles(prior, o, 100, 40, seed=7, dtype=torch.float64).draw(S)


def by_term(o, rule, **options):
    rows = o.rows(torch.arange(R).repeat_interleave(S))
    score = inverse.Posterior(prior, rows, rule)
    options = {"steps": 40, "eta": 1.0, "dtype": torch.float64, **options}
    return sg.sample(score, R * S, seed=8, **options).reshape(R, S, 2)


drawn = {name: by_term(many, rule) for name, rule in RULES.items()}
drawn["particles"] = by_particles(many)
tests = {name: inverse.calibrate(truths, x, many) for name, x in drawn.items()}
print(tests["particles"])
for name, test in tests.items():
    print(f"{name:16s} fails {', '.join(test.failed) or 'nothing'}")
assert tests["particles"].passed
assert not tests["DPS"].passed
assert not tests["ΠGDM"].passed
assert tests["moment matching"].passed

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 4.4), layout="constrained", dpi=120)
axes = figure.subplots(2, 5, sharex=True, sharey="row")
mean, std = R / 16, math.sqrt(R * 15) / 16
for (upper, lower), (name, x) in zip(axes.T, drawn.items(), strict=True):
    z = (many.y - x[:, 0] @ A.matrix.T)[:, 0] / s
    misfit = torch.special.gammainc(torch.tensor(0.5), z**2 / 2)  # even, if z is N(0, 1)
    for ax, values, what in ((upper, tests[name].tarp, "rank"), (lower, misfit, "misfit")):
        ax.hist(values, 16, range=(0, 1), color=plots.COLOURS[0], alpha=0.8)
        ax.axhspan(mean - 3 * std, mean + 3 * std, color=plots.COLOURS[1], alpha=0.25, lw=0)
        ax.set(xlabel=what, xlim=(0, 1), xticks=[0, 0.5, 1])
        ax.spines[["top", "right"]].set_visible(False)
    upper.set_title(name)
figure

# %% [markdown]
# Above, ranks of the truth by its distance from a random point; below, misfits as quantiles of the
# chi-square law. The band holds the bars of a right sampler (three standard deviations). DPS keeps
# the truth outside of its draws far too often, ΠGDM does not fit the measurement well enough.
#
# Two warnings. A test is an average over measurements, in which wrong proportions of modes may
# cancel: moment matching, five times too far off above, passes all lines. And ranks alone
# can be fooled, by the laziest of samplers, which ignores the measurement and draws from the
# *prior*:

# %%
lazy = law.sample(R * S, torch.Generator().manual_seed(9)).reshape(R, S, 2)
test = inverse.calibrate(truths, lazy, many)
print("the prior fails", test.failed)
assert test.failed == ("chi-square, KS",)

# %% [markdown]
# Its ranks are perfect: the truth *is* a draw from the prior. Only the chi-square, which looks at
# the measurement, tells. So use both.

# %% [markdown]
# ## Exercises
#
# Each plants a fault that was published or shipped. Which lines of the test see it, and why these?
#
# **1.** *Noise that means half of what it says.* Images on $[-1,1]$ are measured with $s=0.1$,
# and the sampler, which works on $[0,1]$, is told 0.05 but never rescales its data. What do the
# intervals do?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
half = inverse.Observation(A, many.y, s / 2)
test = inverse.calibrate(truths, by_particles(half), many)
print(test)
print("Too sure: all intervals cover too little, and the draws fit the noise of the measurement.")
assert {"50% interval, least", "95% interval, least", "chi-square, KS"} <= set(test.failed)
assert not any("most" in line for line in test.failed)

# %% [markdown]
# **2.** *The root of the misfit.* DPS as published steps along $-\zeta\,\nabla|o-AD|$, the
# gradient of the norm and not of its square over $s^2$ (`inverse.dps(sde, times, zeta)`, run by
# `sg.solvers.ddpm()`). What is its posterior for noise ten times as large?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
times = sg.grids.default(sde, 60, to_zero=True)
rule, options = inverse.dps(sde, times, 0.3), {"times": times, "solver": sg.solvers.ddpm()}
draws = {
    noise: by_term(inverse.Observation(A, many.y, noise), rule, **options) for noise in (s, 10 * s)
}
print("difference of the draws:", float((draws[s] - draws[10 * s]).abs().max()))
test = inverse.calibrate(truths, draws[s], many)
print("fails", test.failed)
print("The norm's gradient has no noise in it: the spread is that of zeta and the grid.")
assert torch.equal(draws[s], draws[10 * s])
assert not test.passed

# %% [markdown]
# **3.** *The forgotten factor.* Below is a small particle filter: the prior's own steps, weighted
# by $\psi_t=N(o;AD,A C_tA^\top+s^2)$. Where nothing is resampled the weights of a step multiply
# those before; a public implementation kept the last factor alone. Change one line so, and see
# what the evidence and the test say.

# %%
few = many.rows(slice(400))
o, sums = few.y, A.matrix.square().sum()


def filter_particles(count=300, steps=200, forgets=False):
    rows = len(o)
    g = torch.Generator().manual_seed(10)
    grid = sg.grids.default(sde, steps, to_zero=True)
    alpha, v = sde.alpha(grid), prior.facts.std**2
    w = (sde.sigma(grid) / alpha) ** 2
    log_z, log_w, before = (torch.zeros(rows, *n) for n in ((), (count,), (count,)))
    y = w[0].sqrt() * torch.randn(rows, count, 2, generator=g)

    def log_psi(d, w):
        variance = sums * v * w / (v + w) + s**2
        return -0.5 * (o - d @ A.matrix[0]) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()

    for i in range(steps):
        d = law.denoise(alpha[i] * y.flatten(0, 1), grid[i]).reshape(y.shape)
        now = log_psi(d, w[i])
        log_w = now - before if forgets else log_w + now - before
        before = now
        for r in (1 / log_w.softmax(1).square().sum(1) < count / 2).nonzero()[:, 0]:
            log_z[r] += log_w[r].logsumexp(0) - math.log(count)
            k = log_w[r].softmax(0).multinomial(count, True, generator=g)
            y[r], d[r], before[r], log_w[r] = y[r, k], d[r, k], before[r, k], 0.0
        q = w[i + 1] / w[i]
        y = torch.lerp(d, y, q) + (w[i + 1] * (1 - q)).sqrt() * torch.randn(y.shape, generator=g)
    log_w = log_w + log_psi(y, w[-1]) - before
    log_z += log_w.logsumexp(1) - math.log(count)
    k = log_w.softmax(1).multinomial(S, True, generator=g)
    return y.gather(1, k.unsqueeze(2).expand(-1, -1, 2)), log_z


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
exact, off, passed = inverse.log_evidence(law, few), {}, {}
for forgets in (False, True):
    y, log_z = filter_particles(forgets=forgets)
    off[forgets] = float((log_z - exact).square().mean().sqrt())
    test = inverse.calibrate(truths[:400], y, few)
    passed[forgets] = test.passed
    print(f"forgets: {forgets}, evidence off by {off[forgets]:.2f} nats, fails {test.failed}")
assert passed[False]
assert not passed[True]
assert off[True] > 3 * off[False]

# %% [markdown]
# ## What to remember
#
# - The score of $p(o\mid x_t)$ needs the whole law $p(x_0\mid x_t)$. All terms take a Gaussian for
#   it, and differ in its covariance alone.
# - None is exact but for Gaussian data. Particles turn any of them into draws that are, and tell
#   the evidence besides.
# - A sampler can be tested without knowing a single posterior: the truth is one more draw.
# - Look at ranks *and* at the misfit; the prior passes the first.
