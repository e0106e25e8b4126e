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
# # 2. Langevin dynamics
#
# **Every path of it moves for ever. Why does its law stand still, and what does a finite step do
# to it?**
#
# To sample a law whose density we know only up to a constant, or whose score we know only as a
# network: walk uphill, and add noise. This notebook shows why that works, what a computer makes
# of it, three ways to mend it, and why noise levels are needed when the modes are far apart.
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
from sde_gen import mcmc, plots

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## A process that stands still
#
# Take a law $p$ with score $s=\nabla\log p$ and let
#
# $$\mathrm dX=\tfrac12\beta\,s(X)\,\mathrm dt+\sqrt\beta\,\mathrm dW .$$
#
# The drift carries mass uphill, the noise spreads it. Put $p$ into the Fokker-Planck equation:
# $-\nabla\cdot(\tfrac12\beta\,s\,p)+\tfrac12\beta\,\Delta p=0$, because
# $\Delta p=\nabla\cdot(s\,p)$. The two balance *everywhere*, not only on average: no mass flows
# at all. Three blobs, and points that start in their law:

# %%
frame = sg.VP()  # scores know a process; Langevin reads them at one time, here t = 0
angle = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
means = torch.stack([angle.cos(), angle.sin()], 1)
law = sg.GaussianMixture(frame, [0.5, 0.3, 0.2], means, torch.tensor([0.4, 0.35, 0.3]))
start = law.sample(1500, torch.Generator().manual_seed(0))
process = sg.Langevin(law, sg.schedules.Power(1.0, T=4.0))
paths = sg.solve(process, start, torch.linspace(0, 4, 801), sg.EulerMaruyama(), 0, trajectory=True)
group = law.posterior(start).argmax(1)
plots.movie_2d(paths[::20], (-2.2, 2.2, -2.2, 2.2), law.log_prob, groups=group,
               captions=[f"t = {t:.1f}" for t in torch.linspace(0, 4, 41).tolist()])  # fmt: skip

# %% [markdown]
# Colours mix, the cloud stays. The mass of each blob and the mean log-density do not move; and
# the library's reversal says it more strongly: the probability flow of this process is zero, and
# its time reversal is itself.


# %%
def mass(cloud):
    """The part of a cloud that is nearest to each blob."""
    return torch.cdist(cloud, means).argmin(1).bincount(minlength=3) / len(cloud)


exact = mass(law.sample(200_000, torch.Generator().manual_seed(1)))
for k in (0, 400, 800):
    parts, height = mass(paths[k]), float(law.log_prob(paths[k]).mean())
    print(f"t = {k / 200:.0f}: mass {[f'{m:.3f}' for m in parts.tolist()]}, log p {height:.3f}")
    assert (parts - exact).abs().max() < 5 * math.sqrt(0.25 / len(start))
flow = process.probability_flow(lambda x, t: law(x, 0.0))
assert float(flow.drift(start, 1.0).abs().max()) < 1e-12

# %% [markdown]
# ## What a step does: ULA
#
# A computer takes Euler steps, $x\leftarrow x+h\,s(x)+\sqrt{2h}\,z$ (that is $\beta=2$). This is
# *unadjusted* Langevin, and it settles at a law that is not $p$. For $p=N(0,v)$ its variance is
# exactly $v/(1-h/2v)$: too wide, and for $h\ge 2v$ it has none.

# %%
v = 1.0
normal = sg.Gaussian(frame, torch.zeros(1), math.sqrt(v))
x_0 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
measured = {}
steps = (0.05, 0.2, 0.5, 1.0, 1.5)
for h in steps:
    chains = sg.langevin(normal, x_0, steps=300, h=h, warmup=200, thin=30, noise=1)
    measured[h] = float(chains.samples.var())
    print(f"h = {h:4}: variance {measured[h]:.3f}, formula {v / (1 - h / (2 * v)):.3f}")
    assert abs(measured[h] * (1 - h / (2 * v)) / v - 1) < 0.04

# %% [markdown]
# ## Three mends
#
# *MALA* proposes the step of ULA and takes it with the Metropolis probability: no bias, but it
# needs the density and not only its gradient. *Underdamped* dynamics give the state a velocity,
# $\mathrm dx=v\,\mathrm dt$,
# $\mathrm dv=s\,\mathrm dt-\gamma v\,\mathrm dt+\sqrt{2\gamma}\,\mathrm dW$; split well (BAOAB),
# the variance of $x$ on a Gaussian is exact *at every step size*, while the velocity's is
# $1-h^2/4$. *Smaller steps* cost time.

# %%
variance = {"ULA": [], "MALA": [], "BAOAB": []}
sizes = (0.1, 0.3, 0.6, 1.0, 1.4)
for h in sizes:
    for name, method in (("ULA", sg.ULA()), ("MALA", sg.MALA()), ("BAOAB", sg.BAOAB())):
        # MALA adapts its step in a warm-up; without one it keeps the step it was given.
        chains = sg.langevin(normal, x_0, steps=400, h=h, method=method, thin=20, noise=2)
        variance[name].append(float(chains.samples[5:].var()))
fine = torch.linspace(0.02, 1.45, 100)
for name in ("MALA", "BAOAB"):
    assert max(abs(x - 1) for x in variance[name]) < 0.05, name

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=120)
ax = figure.subplots()
ax.plot(fine, 1 / (1 - fine / 2), color=plots.QUIET, lw=1, label="$v/(1-h/2v)$")
for (name, values), colour, marker in zip(variance.items(), plots.COLOURS, "osD", strict=False):
    size, fill = (11, "none") if name == "MALA" else (6, "full")
    ax.plot(sizes, values, marker, color=colour, label=name, ms=size, fillstyle=fill)
ax.axhline(1.0, color="black", lw=0.8, ls=":")
ax.set(
    xlabel="step size $h$",
    ylabel="stationary variance",
    title="the law of the chain, target $N(0,1)$",
)
ax.legend(frameon=False)
figure

# %% [markdown]
# ## How large a step for MALA?
#
# Small steps are always accepted and go nowhere, large ones are always refused. In $d$ dimensions
# with $h=\tfrac12\ell^2d^{-1/3}$ the acceptance tends to $2\Phi(-\ell^3/8)$ on $N(0,I)$, and the
# speed $\ell^2\times$acceptance is best at $\ell=1.65$: acceptance **0.574** (Roberts & Rosenthal
# 1998), whatever the target. `MALA()` adapts to it in its warm-up.

# %%
d = 200
target = sg.Gaussian(frame, torch.zeros(d), 1.0)
x_d = torch.randn(200, d, generator=torch.Generator().manual_seed(3))
ells = torch.tensor([0.8, 1.2, 1.65, 2.0, 2.4])
rate, jump = [], []
for ell in ells.tolist():
    h = 0.5 * ell**2 * d ** (-1 / 3)
    chains = sg.langevin(target, x_d, steps=60, h=h, method=sg.MALA(), noise=4)
    rate.append(float(chains.acceptance.mean()))
    moved = chains.samples.diff(dim=0)
    jump.append(float((moved**2).sum(-1).mean()) / d)
theory = 2 * torch.special.ndtr(-(ells**3) / 8)
print("acceptance", [f"{r:.3f}" for r in rate], "theory", [f"{r:.3f}" for r in theory.tolist()])
assert (torch.tensor(rate) - theory).abs().max() < 0.05
assert max(range(5), key=lambda i: jump[i]) == 2
adapted = sg.langevin(target, x_d, steps=100, h=0.01, method=sg.MALA(), warmup=400, noise=5)
print(
    f"adapted: acceptance {float(adapted.acceptance.mean()):.3f}, h {float(adapted.h.mean()):.3f}"
)
assert abs(float(adapted.acceptance.mean()) - 0.574) < 0.05

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(7, 3), layout="constrained", dpi=120)
ax = figure.subplots()
ax.plot(rate, jump, "o-", color=plots.COLOURS[0])
ax.axvline(0.574, color=plots.QUIET, ls=":")
ax.set(
    xlabel="acceptance",
    ylabel="mean squared jump",
    title=f"MALA in {d} dimensions: best near 0.574",
)
figure

# %% [markdown]
# ## Far modes
#
# The balance is local, and so is the walk. Two blobs, far apart, one with a fifth of the mass:
# chains that start half and half stay half and half. Every local diagnosis looks perfect.

# %%
pair = sg.GaussianMixture(
    sg.VE(sg.schedules.Geometric(0.05, 10.0)),
    [0.2, 0.8],
    torch.tensor([[-2.5, 0.0], [2.5, 0.0]]),
    0.3,
)
n = 1500
x = torch.cat([pair.means[:1], pair.means[1:]]).repeat_interleave(n // 2, 0)
x = x + 0.3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
stuck = sg.langevin(pair, x, steps=1500, h=0.02, thin=1500, noise=0).samples[-1]
left = float((stuck[:, 0] < 0).double().mean())
print(f"mass on the left after 1500 steps: {left:.3f}, exact 0.2")
assert left > 0.45

# %% [markdown]
# Noise makes bridges. *Annealed* Langevin (Song & Ermon 2019) walks at a large noise level, where
# there is one blob, then at a smaller one, and so down. It was the first diffusion model.

# %%
sde = pair.sde
levels = sg.grids.log_snr(sde, 30, end=float(sde.time_at(-2 * math.log(0.05))))
wide = sde.prior(n, 2, generator=torch.Generator().manual_seed(2))
walk = sg.annealed_langevin(pair, wide, levels, steps=40, eps=0.0005, noise=1, trajectory=True)
left_annealed = float((walk[-1][:, 0] < 0).double().mean())
print(f"mass on the left after annealing: {left_annealed:.3f}, exact 0.2")
assert abs(left_annealed - 0.2) < 0.06
captions = [f"noise {float(sde.sigma(t)):.2f}" for t in levels]
plots.movie_2d(
    walk[8:], (-5, 5, -5, 5), pair.log_prob, captions[8:], (walk[-1][:, 0] > 0).long(), fps=8
)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9.5, 3.4), layout="constrained", dpi=120)
for ax, cloud, title in zip(
    figure.subplots(1, 3, sharey=True),
    (pair.sample(n, torch.Generator().manual_seed(5)), stuck, walk[-1]),
    ("the law", f"Langevin: {left:.0%} on the left", f"annealed: {left_annealed:.0%} on the left"),
    strict=True,
):
    ax.scatter(*cloud.T, s=4, color=plots.COLOURS[0], alpha=0.4, lw=0)
    ax.set(title=title, aspect="equal", xlim=(-4, 4), ylim=(-2, 2))
figure

# %% [markdown]
# The levels are a grid of times, and the chain at each level forgets where it came from.
# [Notebook 3](03_reversal.ipynb) asks whether one can do with *one* step at each level. One can:
# that is the reverse-time SDE.
#
# ## Without the noise: modes
#
# A chain without its noise climbs, and ends at a *mode* of the law, where the score is 0.
# `mcmc.modes` climbs at one level of noise, or down the levels as annealed Langevin walks. On the
# line the number of modes can only fall as noise is added (Silverman 1981), so they form a tree
# with one root: white dots are all that is found at each level by itself, from 61 starts; the line
# is where all starts end that climb down the levels from the root.

# %%
clock = sg.VE(sg.schedules.Geometric(0.02, 3.0))
hills = sg.GaussianMixture(
    clock,
    [0.3, 0.15, 0.25, 0.3],
    torch.tensor([[-1.6], [-0.7], [0.4], [1.5]]),
    torch.tensor([0.2, 0.12, 0.3, 0.25]),
)
levels = sg.grids.log_snr(clock, 50, end=float(clock.time_at(-2 * math.log(0.02))))
starts = torch.linspace(-3, 3, 61)[:, None]
alone = torch.stack([mcmc.modes(hills, starts, [float(t)], 80)[:, 0] for t in levels])
down = mcmc.modes(hills, starts, levels, 40, trajectory=True)[..., 0]
number = [len(torch.unique((x * 1e3).round())) for x in alone]
print("modes at each level, from much noise to little:", number)
print(f"all of {len(starts)} starts climb down to {float(down[-1].mean()):.4f}")
ends = torch.unique((alone[-1] * 1e3).round() / 1e3)
print("modes at the last level:", [f"{float(x):.3f}" for x in ends])
assert number == sorted(number)
assert number[0] == 1
assert number[-1] == 4
assert hills(alone[-1][:, None], levels[-1]).abs().max() < 1e-6
assert down[-1].std() < 1e-6

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=120)
ax = figure.subplots()
plots.density_over_time(hills.log_prob, levels, title="the modes of a law under noise", ax=ax)
ax.plot(levels, alone, ".", color="white", ms=3)
ax.plot(levels, down[:, 0], color=plots.COLOURS[2], lw=2)
noise = (3.0, 1.0, 0.3, 0.1, 0.03)
ax.set_xticks([float(clock.time_at(-2 * math.log(v))) for v in noise], list(map(str, noise)))
ax.set(xlabel=r"noise $\sigma$", ylabel="state $x$")
figure

# %% [markdown]
# One mode is found, the one that the others run into, and it says nothing of their mass. That is
# the difference between *optimising* a law and *sampling* it; of images a mode is a smooth,
# empty picture that no sample resembles.
#
# ## Exercises
#
# **1.** For $p=N(0,v)$ derive ULA's stationary variance. (The step is linear: what variance does
# it leave alone?) Then find the step at which the standard deviation is 10 % too large, and
# check.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
# u = (1 - h / v)^2 u + 2 h, so u = v / (1 - h / 2v); and 1.21 = 1 / (1 - h / 2).
h = 2 * (1 - 1 / 1.21)
wide_chain = sg.langevin(normal, x_0, steps=400, h=h, warmup=100, thin=20, noise=6)
print(f"h = {h:.3f}: standard deviation {float(wide_chain.samples.std()):.3f}")
assert abs(float(wide_chain.samples.std()) - 1.1) < 0.02

# %% [markdown]
# **2.** A long thin Gaussian, standard deviations 1 and 0.05: how many steps does ULA need, and
# how many with the covariance as `preconditioner`? Use the lag at which the correlation along the
# long axis has fallen to 0.5.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
thin_law = sg.Gaussian(frame, torch.zeros(2), torch.tensor([1.0, 0.05]))
x_thin = thin_law.sample(2000, torch.Generator().manual_seed(7))
lags = {}
for name, size, matrix in (
    ("plain", 0.3 * 0.05**2, None),
    ("preconditioned", 0.3, torch.diag(torch.tensor([1.0, 0.05**2]))),
):
    run = sg.langevin(
        thin_law, x_thin, steps=1500, h=size, noise=8, preconditioner=matrix
    ).samples[..., 0]
    correlation = (run * x_thin[:, 0]).mean(1) / (x_thin[:, 0] ** 2).mean()
    lags[name] = int((correlation < 0.5).nonzero()[0]) + 1
    print(f"{name:15} correlation falls to a half in {lags[name]} steps")
assert lags["plain"] > 100 * lags["preconditioned"]

# %% [markdown]
# **3.** Measure both variances of BAOAB at $h=1$ on $N(0,1)$: the position's and the velocity's.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
run = sg.langevin(normal, x_0, steps=500, h=1.0, method=sg.BAOAB(), thin=10, noise=9)
position, velocity = float(run.samples[10:].var()), float(run.velocity.var())
print(f"position {position:.3f} (exact 1), velocity {velocity:.3f} (exact 1 - h^2 / 4 = 0.75)")
assert abs(position - 1) < 0.03
assert abs(velocity - 0.75) < 0.08

# %% [markdown]
# ## What to remember
#
# - Langevin dynamics balance drift and noise at every point: the law stands still while every
#   path moves.
# - A finite step has a law of its own. Metropolis removes the bias, a velocity reduces it, a
#   smaller step buys it off.
# - It forgets locally and fast, globally and never. Noise levels make the modes meet: that is
#   diffusion.
