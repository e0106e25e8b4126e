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
# # 3. Forward and back
#
# **Noise destroys data. How can it be run backwards, and in how many ways?**
#
# [Notebook 1](01_processes.ipynb) ended with every law becoming the same Gaussian. Here we go
# back. The secret is one vector field, the *score*; with it there is not one way back but a whole
# family. Everything is exact: the data are a mixture of Gaussians, whose score at every time is
# known in closed form.
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

import torch
from matplotlib.figure import Figure

import sde_gen as sg
from sde_gen import plots

torch.set_default_dtype(torch.float64)

sde = sg.VP(sg.schedules.Linear(0.1, 12.0))
means, stds = torch.tensor([[-1.6], [0.0], [1.2]]), torch.tensor([0.15, 0.3, 0.1])
law = sg.GaussianMixture(sde, [0.3, 0.4, 0.3], means, stds)
times = sg.grids.uniform(sde, 400, end=0.0)

# %% [markdown]
# ## Running the film backwards does not work
#
# `VP` is $\mathrm dX=-\tfrac12\beta X\,\mathrm dt+\sqrt\beta\,\mathrm dW$. Reverse its drift
# alone, and every point runs away: the spring that pulled inwards now pushes outwards, by a
# factor $1/\alpha_T$, and the noise cannot be taken back, because nobody remembers it.

# %%
widening = 1 / float(sde.alpha(sde.T))
print(f"without the score the film ends {widening:.0f} times wider than it began")
zero = sg.Gaussian(sde, torch.zeros(1), 1e6)  # so flat that its score vanishes
start = sde.prior(2000, 1, generator=torch.Generator().manual_seed(0))
runaway = sg.solve(sde.probability_flow(zero), start, times, sg.Heun())
print(f"standard deviation at the end: {runaway.std():.1f}; of the data: {law.facts.std:.2f}")
assert abs(float(runaway.std() / start.std()) / widening - 1) < 0.02

# %% [markdown]
# ## The score knows the way
#
# The score $s(x,t)=\nabla_x\log p_t(x)$ points to where the law is denser. Because
# $\Delta p=\nabla\cdot(p\,s)$, diffusion can be *written as a drift*: in the Fokker-Planck
# equation
#
# $$\partial_t p=-\nabla\cdot(b\,p)+\tfrac12g^2\Delta p
#   =-\nabla\cdot\left(\left[b-\tfrac{1+\eta^2}2g^2s\right]p\right)-\tfrac{\eta^2}2\,g^2\Delta p$$
#
# for every $\eta$. Read from $T$ to 0, the last term is a diffusion of strength $\eta g$ with the
# right sign. So
#
# $$\mathrm dX=\left[b-\tfrac{1+\eta^2}2g^2s\right]\mathrm dt+\eta\,g\,\mathrm d\bar W$$
#
# has the same laws $p_t$ at all times, whatever $\eta$. $\eta=0$: an ODE, the *probability flow*.
# $\eta=1$: Anderson's reverse-time SDE. In the library: `sde.reverse(law, eta)`.

# %%
ends = {
    eta: sg.solve(sde.reverse(law, eta), start, times, sg.EulerMaruyama(), 1, trajectory=True)
    for eta in (0.0, 0.5, 1.0, 2.0)
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10, 6), layout="constrained", dpi=110)
axes = figure.subplots(2, 2, sharex=True, sharey=True)
for ax, (eta, paths) in zip(axes.flat, ends.items(), strict=True):
    title = {0.0: "probability flow", 1.0: "reverse-time SDE"}.get(eta, "")
    plots.density_over_time(
        law.log_prob, times, paths, shown=14, title=f"$\\eta$ = {eta:g}  {title}", ax=ax
    )
figure

# %% [markdown]
# Four ways of moving, one law at every time. The paths of the flow never cross; with growing
# $\eta$ they jump between the modes for longer. We check the law where it can be computed: the
# mass near each mode at the end, and the variance half way.

# %%
borders = torch.tensor([-0.9, 0.75])
exact = torch.tensor([0.3, 0.4, 0.3])
half = int((times - 0.5).abs().argmin())
alpha, sigma = sde.alpha(times[half]), sde.sigma(times[half])
half_variance = float(alpha**2 * law.facts.std**2 + sigma**2)
for eta, paths in ends.items():
    mass = torch.bucketize(paths[-1, :, 0].contiguous(), borders).bincount(minlength=3) / len(
        start
    )
    var = float(paths[half].var())
    print(f"eta = {eta:3}: modes {[f'{m:.3f}' for m in mass.tolist()]}, variance {var:.3f}")
    assert (mass - exact).abs().max() < 5 * math.sqrt(0.24 / len(start)) + 0.01
    assert abs(var - half_variance) < 0.15
print(f"exact:     modes ['0.300', '0.400', '0.300'], variance {half_variance:.3f}")

# %% [markdown]
# ## The field that does it
#
# In the plane. At large noise the score sees one blob and points to its centre; as the noise
# falls the field splits, and each point must decide.

# %%
angle = torch.arange(5) * 2 * torch.pi / 5 + torch.pi / 2
star = sg.GaussianMixture(
    sde, torch.ones(5), 1.3 * torch.stack([angle.cos(), angle.sin()], 1), 0.13
)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=120)
for ax, t in zip(figure.subplots(1, 3), (0.8, 0.2, 0.08), strict=True):
    plots.score_field(
        lambda x, t=t: star(x, t),
        (-2.2, 2.2, -2.2, 2.2),
        lambda x, t=t: star.log_prob(x, t),
        arrows=19,
        title=f"score at t = {t}",
        ax=ax,
    )
figure

# %% [markdown]
# The same start, carried by the flow. Colours say where each point will end: the flow has cut the
# Gaussian into five sectors long before anything is to be seen.

# %%
cloud = sde.prior(1000, 2, generator=torch.Generator().manual_seed(1))
grid = sg.grids.log_snr(sde, 160, end=1e-3)
flow = sg.solve(sde.probability_flow(star), cloud, grid, sg.Exponential(3), trajectory=True)
group = star.posterior(flow[-1], 0.0).argmax(1)
captions = [f"t = {t:.3f}" for t in grid[::4].tolist()]
plots.movie_2d(flow[::4], (-3, 3, -3, 3), captions=captions, groups=group)

# %% [markdown]
# And by the reverse-time SDE: the colours, again the places where points end, are mixed until
# late. Noise decides.

# %%
grid = sg.grids.log_snr(sde, 400, end=1e-3)
jumps = sg.solve(sde.reverse(star), cloud, grid, sg.EulerMaruyama(), 2, trajectory=True)
group = star.posterior(jumps[-1], 0.0).argmax(1)
captions = [f"t = {t:.3f}" for t in grid[::10].tolist()]
plots.movie_2d(jumps[::10], (-3, 3, -3, 3), captions=captions, groups=group)

# %% [markdown]
# ## What only the flow can do
#
# An ODE can be undone. The flow encodes data as noise and decodes it again; on the line it keeps
# every quantile (paths do not cross); and it carries the density along:
# $\log p_0(x_0)=\log p_T(x_T)+\int\nabla\cdot v\,\mathrm dt$.

# %%
exact_flow = sg.SciPy("DOP853", 1e-8, 1e-8)
data = law.sample(400, torch.Generator().manual_seed(5))
code = sg.solve(sde.probability_flow(law), data, [0.0, sde.T], exact_flow)
back = sg.solve(sde.probability_flow(law), code, [sde.T, 0.0], exact_flow)
order = data[:, 0].argsort()
print(f"encode and decode: largest error {float((back - data).abs().max()):.1e}")
assert float((back - data).abs().max()) < 1e-5
assert bool((code[order].diff(dim=0) > -1e-6).all()), "quantiles keep their order"

by_flow = sg.log_prob(law, data[:50], steps=100).value
difference = float((by_flow - law.log_prob(data[:50])).abs().max())
print(f"log density by the flow and in closed form differ by {difference:.1e}")
assert difference < 2e-3

# %% [markdown]
# ## Why then any noise?
#
# Because scores are never perfect. Start all paths at a wrong place, say a Gaussian half as wide
# as it should be. The flow keeps the mistake (quantile for quantile). The SDE forgets it: noise
# is what heals.

# %%
wrong = 0.5 * start
healed = {}
for eta in (0.0, 0.5, 1.0, 2.0):
    x = sg.solve(sde.reverse(law, eta), wrong, times, sg.EulerMaruyama(), 3)
    mass = torch.bucketize(x[:, 0].contiguous(), borders).bincount(minlength=3) / len(x)
    healed[eta] = float((mass - exact).abs().sum()) / 2
    print(f"eta = {eta:3}: {healed[eta]:.3f} of the mass in the wrong mode")
assert healed[0.0] > 0.25 > 0.08 > healed[1.0]

# %% [markdown]
# ## Exercises
#
# **1.** Reverse Brownian motion that starts at a point $m$. Show that the drift of the
# reverse-time SDE is $-(m-x)/t$ per unit of (falling) time: a Brownian bridge. All paths must
# come home.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
wiener = sg.Wiener()
point = sg.Gaussian(wiener, torch.tensor([0.7]), 0.0)
x, t = torch.linspace(-2, 2, 9)[:, None], 0.3
assert torch.allclose(wiener.reverse(point).drift(x, t), -(0.7 - x) / t)
grid = sg.grids.uniform(wiener, 400, end=1e-4, power=2.0)
home = sg.solve(
    wiener.reverse(point), 0.7 + wiener.prior(300, 1), grid, sg.EulerMaruyama(), 0, trajectory=True
)
print(
    f"standard deviation at the end {float(home[-1].std()):.4f}, of the law there {1e-4**0.5:.4f}"
)
assert float(home[-1].std()) < 0.02
plots.trajectories_1d(
    grid, home[:, :60], title="the reversal of Brownian motion from a point is a bridge"
)

# %% [markdown]
# **2.** Reverse a Langevin process that starts at its own target. What are its drift and its
# flow? (Compute $b-g^2s$ and $b-\tfrac12g^2s$ first.)

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
langevin = sg.Langevin(law)
x = torch.linspace(-3, 3, 13)[:, None]
still = langevin.probability_flow(lambda x, t: law(x, 0.0)).drift(x, 0.5)
reverse = langevin.reverse(lambda x, t: law(x, 0.0)).drift(x, 0.5)
assert float(still.abs().max()) < 1e-12  # the flow stands still
assert torch.allclose(-reverse, langevin.drift(x, 0.5))  # in falling time: the same process
print("the flow stands still, and the process is its own reversal")

# %% [markdown]
# **3.** The last movie shows noise deciding late. Take two copies that share everything until
# $t=0.35$ and then draw different noise. How often do they end in the same mode? And from
# $t=0.12$?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
agree = {}
for split in (0.8, 0.35, 0.12):
    first = sg.grids.log_snr(sde, 200, end=split)
    rest = sg.grids.log_snr(sde, 200, start=split, end=1e-3)
    x = sg.solve(sde.reverse(star), cloud, first, sg.EulerMaruyama(), 0)
    pair = [sg.solve(sde.reverse(star), x, rest, sg.EulerMaruyama(), seed) for seed in (1, 2)]
    modes = [star.posterior(y, 0.0).argmax(1) for y in pair]
    agree[split] = float((modes[0] == modes[1]).double().mean())
    print(f"split at t = {split}: {agree[split]:.2f} agree (chance is 0.20)")
assert agree[0.8] < 0.3 < agree[0.35] < agree[0.12]
assert agree[0.12] > 0.95

# %% [markdown]
# ## What to remember
#
# - The score turns a diffusion into a drift; that is why it can be reversed.
# - One family: the same laws for every $\eta$. $\eta=0$ can be undone and has a likelihood;
#   $\eta>0$ heals errors.
# - The score is all that is missing. [Notebook 4](04_learning.ipynb) learns it from data.
