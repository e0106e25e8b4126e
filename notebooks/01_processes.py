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
# # 1. A point and a cloud
#
# **An ODE moves a point. What does an SDE move?**
#
# We meet the two processes that everything else is made of: Brownian motion, and Ornstein and
# Uhlenbeck's process, which is Brownian motion on a spring. By the end you can say what a drift
# does, what a diffusion does, and why a *law* (a cloud of points) is the right thing to watch.
#
# *Needs `sde-gen[data]` and nothing else; runs in half a minute on one CPU core.*

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
from itertools import pairwise

import torch
from matplotlib.figure import Figure

import sde_gen as sg
from sde_gen import plots

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## An ODE moves a point
#
# Take the drift $b(x)=-x$ and no noise. Every point falls to 0, the same way each time. In the
# library an ODE is an SDE whose diffusion $g$ vanishes.


# %%
class Spring(sg.SDE):
    """dX = -X dt: no noise."""

    T = 5.0
    direction = 0

    def drift(self, x, t):
        return -x

    def diffusion(self, t):
        return torch.zeros_like(torch.as_tensor(t))


spring, ou = Spring(), sg.OrnsteinUhlenbeck(a=-1.0, g=math.sqrt(2.0), end=5.0)
times = torch.linspace(0, 5, 1001)
three = torch.tensor([[-2.0], [1.0], [3.0]])
ode = sg.solve(spring, three, times, sg.EulerMaruyama(), trajectory=True)
sde = [sg.solve(ou, three, times, sg.EulerMaruyama(), seed, trajectory=True) for seed in range(12)]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=130)
left, right = figure.subplots(1, 2, sharey=True)
for i in range(3):
    left.plot(times, ode[:, i, 0], color=plots.COLOURS[i], lw=2)
    for path in sde:
        right.plot(times, path[:, i, 0], color=plots.COLOURS[i], lw=0.5, alpha=0.6)
left.set(title="ODE: three points, three curves", xlabel="time $t$", ylabel="state $x$")
right.set(title="SDE: the same three points, twelve times", xlabel="time $t$")
figure

# %% [markdown]
# The left picture can be repeated, the right one cannot: at $t=5$ nobody can tell which colour
# started where. What *can* be repeated is the cloud: at each time it has a law, and that law
# follows an equation.
#
# ## Brownian motion
#
# `Wiener` is $\mathrm dX=\mathrm dW$: independent Gaussian increments of variance $t-s$. Three
# facts: $\mathrm{Var}\,W_t=t$; $\mathrm{Cov}(W_s,W_t)=\min(s,t)$; and the squares of ever finer
# increments sum to $t$, a path so rough that it has a length of infinity and a *quadratic*
# variation of $t$.

# %%
wiener = sg.Wiener()
grid = torch.linspace(0, 1, 501)
n = 4000
paths = sg.solve(wiener, torch.zeros(n, 1), grid, sg.EulerMaruyama(), 0, trajectory=True)[..., 0]
plots.trajectories_1d(
    grid, paths[:, :200], title="Brownian motion: a cloud that widens like the root of time"
)

# %%
s, t = 100, 400  # grid[100] = 0.2, grid[400] = 0.8
variance = float(paths[t].var())
covariance = float((paths[s] * paths[t]).mean())
rough = paths.diff(dim=0)
quadratic, length = (rough**2).sum(0), rough.abs().sum(0)
print(f"Var W(0.8)          {variance:.3f}   exact 0.8")
print(f"Cov(W(0.2), W(0.8)) {covariance:.3f}   exact 0.2")
print(
    f"sum of squares      {quadratic.mean():.3f} +- {quadratic.std():.3f}   of each path, exact 1"
)
print(f"sum of lengths      {length.mean():.1f}   grows like the root of the number of steps")

assert abs(variance - 0.8) < 4 * 0.8 * math.sqrt(2 / n)
assert abs(covariance - 0.2) < 4 * math.sqrt((0.2 * 0.8 + 0.2**2) / n)
assert abs(float(quadratic.mean()) - 1) < 4 * math.sqrt(2 / 500 / n)
assert abs(float(length.mean()) - math.sqrt(2 * 500 / math.pi)) < 0.1

# %% [markdown]
# A path is one function, however finely you read it. `BrownianPath` keeps it: each refinement
# adds points *between* those that you have seen. This is what lets us compare a coarse and a fine
# simulation of the *same* path.

# %%
path, one = sg.BrownianPath(seed=3), torch.zeros(1, 1)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3), layout="constrained", dpi=130)
ax = figure.subplots()
for steps, colour, width in (
    (8, plots.COLOURS[1], 2.2),
    (64, plots.COLOURS[0], 1.2),
    (1024, plots.QUIET, 0.4),
):
    at = torch.linspace(0, 1, steps + 1)
    ax.plot(
        at,
        [float(path.at(one, float(u))) for u in at],
        color=colour,
        lw=width,
        label=f"{steps} steps",
    )
ax.legend(frameon=False)
ax.set(title="one Brownian path, read three times", xlabel="time $t$", ylabel="$W_t$")
figure

# %% [markdown]
# ## Ornstein and Uhlenbeck: noise on a spring
#
# $\mathrm dX=aX\,\mathrm dt+g\,\mathrm dW$ with $a<0$. It is *linear*, so $x_t$ given $x_0$ is
# Gaussian, $x_t=\alpha_t x_0+\sigma_t z$ with
#
# $$\alpha_t=e^{at},\qquad\sigma_t^2=\frac{g^2}{-2a}\,(1-e^{2at}).$$
#
# The spring forgets ($\alpha\to0$), the noise piles up until the spring holds it
# ($\sigma^2\to -g^2/2a$, here 1).

# %%
n = 20_000
start = torch.full((n, 1), 2.0)
cloud = sg.solve(ou, start, torch.linspace(0, 5, 501), sg.EulerMaruyama(), 1, trajectory=True)[
    ..., 0
]
at = torch.linspace(0, 5, 501)
mean, std = cloud.mean(1), cloud.std(1)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3), layout="constrained", dpi=130)
ax = figure.subplots()
ax.plot(at, cloud[:, :60], color=plots.QUIET, lw=0.3, alpha=0.5)
ax.plot(at, 2 * ou.alpha(at), color=plots.COLOURS[1], lw=2, label=r"$\alpha_t x_0$")
for sign in (-1, 1):
    ax.plot(at, 2 * ou.alpha(at) + sign * ou.sigma(at), color=plots.COLOURS[0], lw=2,
            label=r"$\alpha_t x_0\pm\sigma_t$" if sign > 0 else None)  # fmt: skip
    ax.plot(
        at, mean + sign * std, color="black", lw=1, ls=":", label="measured" if sign > 0 else None
    )
ax.legend(frameon=False)
ax.set(title="from $x_0=2$ to rest", xlabel="time $t$", ylabel="state $x$")
figure

# %%
for u in (50, 100, 500):
    assert abs(float(mean[u]) - 2 * float(ou.alpha(at[u]))) < 0.03
    assert abs(float(std[u]) - float(ou.sigma(at[u]))) < 0.03
lag = float((cloud[400] * cloud[500]).mean() - cloud[400].mean() * cloud[500].mean())
print(f"Cov(X(4), X(5)) at rest: {lag:.3f}, exact e^-1 = {math.exp(-1):.3f}")
assert abs(lag - math.exp(-1)) < 0.03

# %% [markdown]
# ## What moves is the law
#
# The law $p_t$ of the cloud follows the Fokker-Planck equation, a *deterministic* one:
#
# $$\partial_t p=-\nabla\cdot(b\,p)+\tfrac12g^2\,\Delta p .$$
#
# The first term carries mass along the drift, the second spreads it. Start with three narrow
# peaks. Single paths are wild; the picture behind them is smooth and would come out the same
# every time. It is all that a generative model ever needs to know.

# %%
fast = sg.OrnsteinUhlenbeck(end=2.0)
law = sg.GaussianMixture(fast, [0.3, 0.4, 0.3], torch.tensor([[-2.0], [0.3], [2.2]]), 0.1)
grid = sg.grids.uniform(fast, 300, end=0.0).flip(0)
data = law.sample(30, torch.Generator().manual_seed(0))
paths = sg.solve(fast, data, grid, sg.EulerMaruyama(), 0, trajectory=True)
plots.density_over_time(law.log_prob, grid, paths, title="thirty paths, one law")

# %% [markdown]
# In the plane, in motion: seven blobs forget which blob they were.

# %%
angle = torch.arange(7) * 2 * torch.pi / 7
means = 2 * torch.stack([angle.cos(), angle.sin()], 1)
ring = sg.GaussianMixture(fast, torch.ones(7), means, 0.12)
x = ring.sample(1200, torch.Generator().manual_seed(2))
group = torch.cdist(x, means).argmin(1)
frames = torch.linspace(0, 1, 41)
moving = sg.solve(fast, x, torch.linspace(0, 1, 401), sg.EulerMaruyama(), 5, trajectory=True)[::10]
plots.movie_2d(
    moving, (-3.2, 3.2, -3.2, 3.2), captions=[f"t = {u:.2f}" for u in frames], groups=group
)

# %% [markdown]
# ## What a computer solves
#
# Euler and Maruyama step $x_{t+h}=x_t+h\,b(x_t,t)+g\sqrt h\,z$. Two kinds of error: the *path* is
# wrong (strong error, here of order $h$), and the *law* is wrong (weak error). For
# Ornstein-Uhlenbeck the stationary variance of the scheme is known: with $v=-g^2/2a$ it is
# $v/(1+ah/2)$, always too wide.
#
# A linear scheme is an affine map of its random numbers. `Impulses` feeds it unit impulses, so
# one deterministic run gives the exact variance of what it would produce: no sampling error at
# all.


# %%
def scheme_variance(h):
    """The exact variance of Euler-Maruyama at rest: sum of squared responses to each draw."""
    steps = round(20 / h)
    long = sg.OrnsteinUhlenbeck(end=steps * h + 1e-9)
    response = sg.solve(
        long,
        torch.zeros(steps + 1, 1),
        torch.arange(steps + 1) * h,
        sg.EulerMaruyama(),
        sg.Impulses(),
    )
    return float((response**2).sum())


for h in (0.5, 0.2, 0.1, 0.05):
    print(f"h = {h:4}:  variance {scheme_variance(h):.6f}   formula {1 / (1 - h / 2):.6f}")
    assert abs(scheme_variance(h) - 1 / (1 - h / 2)) < 1e-6

# %% [markdown]
# And the strong error, on shared Brownian paths: halve the step, halve the error.

# %%
noise = sg.BrownianPath(seed=0)
x_0 = torch.zeros(200, 1)
fine = sg.solve(ou, x_0, torch.linspace(0, 2, 2049), sg.EulerMaruyama(), noise)
strong = []
for steps in (16, 32, 64, 128):
    coarse = sg.solve(ou, x_0, torch.linspace(0, 2, steps + 1), sg.EulerMaruyama(), noise)
    strong.append(float((coarse - fine).abs().mean()))
orders = [math.log2(a / b) for a, b in pairwise(strong)]
print("errors", [f"{e:.4f}" for e in strong], "orders", [f"{p:.2f}" for p in orders])
assert all(0.85 < p < 1.25 for p in orders)

# %% [markdown]
# ## Exercises
#
# **1.** Tie a Brownian path down at both ends: $W_t-tW_1$ is the Brownian bridge. What is its
# variance at time $t$? Guess from the picture, then check.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
grid = torch.linspace(0, 1, 101)
w = sg.solve(wiener, torch.zeros(20_000, 1), grid, sg.EulerMaruyama(), 7, trajectory=True)[..., 0]
bridge = w - grid[:, None] * w[-1]
error = (bridge.var(1) - grid * (1 - grid)).abs().max()
print(f"t (1 - t); largest deviation {error:.4f}")
assert error < 4 * 0.25 * math.sqrt(2 / 20_000)

# %% [markdown]
# **2.** `VP` is an Ornstein-Uhlenbeck process with a moving clock. Show that at the times where
# their signal levels $\alpha$ agree, their noise levels agree too.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
vp = sg.VP()
t = torch.tensor([0.2, 0.5, 0.9])
clock = vp.schedule.integral(t) / 2  # alpha = exp(-B / 2) = exp(-time of the OU process)
assert torch.allclose(ou.alpha(clock), vp.alpha(t))
assert torch.allclose(ou.sigma(clock), vp.sigma(t))
print("VP at t is OU at B(t) / 2:", clock)

# %% [markdown]
# **3.** From which step size on does Euler-Maruyama on `ou` blow up? Answer from the formula,
# then see it happen.


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
# The factor of a step is 1 - h: beyond h = 2 its modulus exceeds 1, and the variance grows.
def after(h, steps=60):
    """Standard deviation after so many steps."""
    long = sg.OrnsteinUhlenbeck(end=steps * h + 1e-9)
    return float(
        sg.solve(
            long, torch.zeros(4000, 1), torch.arange(steps + 1) * h, sg.EulerMaruyama(), 0
        ).std()
    )


print(f"h = 1.9: {after(1.9):.2f}   h = 2.1: {after(2.1):.0f}")
assert after(1.9) < 5 < 100 < after(2.1)

# %% [markdown]
# ## What to remember
#
# - An SDE moves a law, deterministically; paths are only its messengers.
# - A linear process is two functions of time: how much signal is left ($\alpha$), how much noise
#   there is ($\sigma$).
# - Destroying data is easy: every law ends as the same Gaussian. [Notebook 3](03_reversal.ipynb)
#   runs it backwards.
