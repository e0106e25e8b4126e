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
# # 5. Samplers compared
#
# **What does another network call buy, and which sampler buys most with it?**
#
# A sampler is a process, a solver and a grid. With exact scores there is no network to blame, and
# with exact answers no opinion: we measure errors. First the *order* (how fast the error falls),
# then the *constant* (how large it is at the 5 to 50 calls that one can afford), then pictures.
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
from sde_gen import data, metrics, plots
from sde_gen.networks import MLP
from sde_gen.solvers import ddim, ddpm, dpm_solver_pp, sa_solver, unipc

torch.set_default_dtype(torch.float64)
sde = sg.VP()

# %% [markdown]
# ## Order
#
# A solver of order $p$ halves its step and divides its error by $2^p$. Eight blobs on a circle;
# the exact end of the probability flow from a very fine run. `calls` counts evaluations of the
# score, which is where the time goes.

# %%
angle = torch.arange(8) * torch.pi / 4
ring = sg.GaussianMixture(sde, torch.ones(8), torch.stack([angle.cos(), angle.sin()], 1), 0.3)
flow, end = sde.probability_flow(ring), 0.02
x_T = sde.perturb(
    ring.sample(64, torch.Generator().manual_seed(0)), sde.T, torch.Generator().manual_seed(1)
).x
exact = sg.solve(flow, x_T, [sde.T, end], sg.SciPy("DOP853", 1e-11, 1e-11))

solvers = {
    "Euler (order 1)": sg.EulerMaruyama(),
    "DDIM (order 1)": ddim(),
    "Heun (order 2)": sg.Heun(),
    "DPM-Solver++ 2M (order 2)": dpm_solver_pp(2),
    "Exponential(3) (order 3)": sg.Exponential(3),
    "Exponential(3) corrected (order 4)": sg.Exponential(3, corrector=True),
    "Runge-Kutta (order 4)": sg.RungeKutta(),
}
figure = Figure(figsize=(8.5, 4.2), layout="constrained", dpi=120)
ax = figure.subplots()
orders = {}
for (name, solver), colour in zip(solvers.items(), plots.COLOURS, strict=True):
    steps = [20, 40, 80, 160]
    errors = [
        float(
            (sg.solve(flow, x_T, sg.grids.log_snr(sde, n, end=end), solver) - exact)
            .norm(dim=1)
            .mean()
        )
        for n in steps
    ]
    orders[name] = math.log2(errors[-2] / errors[-1])
    ax.loglog([n * solver.calls for n in steps], errors, "o-", color=colour, label=name, ms=4)
counts = [20, 40, 80, 160, 320, 640]
ax.set(
    xlabel="calls of the score", ylabel="mean error of a sample", xticks=counts, xticklabels=counts
)
ax.set_title("steps even in log-SNR")
ax.xaxis.minorticks_off()
ax.legend(frameon=False, fontsize="small")
print({name: round(p, 2) for name, p in orders.items()})
for name, p in orders.items():
    assert abs(p - int(name[-2])) < 0.45, name
figure

# %% [markdown]
# Order decides on the right of the picture, where nobody samples. On the left what counts is the
# constant, and it holds surprises: DDIM solves the linear part of the equation exactly, Euler does
# not, and yet Euler is ahead here. The errors that matter are in what is *not* linear.
#
# ## What five to fifty calls buy
#
# Now a score like that of images: the exact score of 1397 handwritten digits, each a Gaussian of
# spread 0.05 in 64 dimensions. The same start for all, the root-mean-square error of a pixel at
# the end, median over samples.

# %%
x, labels = data.digits("train")
digits = sg.GaussianMixture(sde, torch.ones(len(x)), x.double(), 0.05)
last = sg.grids.default_end(sde)
generator = torch.Generator().manual_seed(0)
start = sde.perturb(digits.sample(48, generator), sde.T, generator).x
flow = sde.probability_flow(digits)
truth = sg.solve(
    flow, start, sg.grids.log_snr(sde, 250, end=last), sg.Exponential(4, corrector=True)
)

default = sg.default_solver(digits)
moments = sg.Exponential(4, sg.data_moments(x), corrector=True, weights=default.weights)


def even(n):
    return sg.grids.default(sde, n, end=last, data_std=digits.facts.std)


def karras(n):
    return sg.grids.karras(sde, n, end=last)


def log_snr(n):
    return sg.grids.log_snr(sde, n, end=last)


samplers = {
    "Heun, Karras grid": (sg.Heun(), karras),
    "DDIM, log-SNR": (ddim(), log_snr),
    "DPM-Solver++ 2M, Karras grid": (dpm_solver_pp(2), karras),
    "DPM-Solver++ 2M, default grid": (dpm_solver_pp(2), even),
    "UniPC-3, log-SNR": (unipc(3), log_snr),
    "with the data's covariance, default grid": (moments, even),
    "default of sample()": (default, even),
}
calls, error, drawn = (6, 10, 20, 50), {}, {}
for name, (solver, grid) in samplers.items():
    for n in calls:
        y = sg.solve(flow, start, grid(n // solver.calls), solver)
        drawn[name, n] = y
        error[name, n] = float((y - truth).flatten(1).square().mean(1).sqrt().median())
print(f"{'calls':40}" + "".join(f"{n:>9}" for n in calls))
for name in samplers:
    print(f"{name:40}" + "".join(f"{error[name, n]:9.1e}" for n in calls))

# %%
for n in calls:
    assert error["default of sample()", n] < error["DPM-Solver++ 2M, Karras grid", n]
    assert error["default of sample()", n] < error["DDIM, log-SNR", n]
assert error["default of sample()", 10] < 0.2 * error["DPM-Solver++ 2M, Karras grid", 10]
assert error["default of sample()", 10] < 1.5 * error["Heun, Karras grid", 50]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8.5, 4), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, _), colour in zip(samplers.items(), plots.COLOURS, strict=True):
    width = 2.5 if "default" in name else 1.3
    ax.loglog(
        calls, [error[name, n] for n in calls], "o-", color=colour, label=name, ms=4, lw=width
    )
ax.set(
    xlabel="calls of the score", ylabel="median error of a pixel", xticks=calls, xticklabels=calls
)
ax.minorticks_off()
ax.legend(frameon=False, fontsize="small")
figure

# %% [markdown]
# Three lessons. *The grid* is worth as much as the solver (two lines differ in nothing else). *A
# corrector* raises the order for no call. *Knowing something of the data*, their variance or
# covariance, is worth more than order at few calls: the step is then exact for Gaussian data, and
# only what is not Gaussian is left to interpolate.
#
# Heun, the solver of EDM, spends two calls a step: with fifty calls it comes to where the default
# is with ten. Here is what six calls look like.

# %%
names = [
    "Heun, Karras grid",
    "DDIM, log-SNR",
    "DPM-Solver++ 2M, default grid",
    "default of sample()",
]
rows = torch.cat([drawn[name, 6][:12] for name in names] + [truth[:12]])
plots.image_grid(rows, rows=5, labels=[*names, "exact"])

# %% [markdown]
# ## The same on a trained network
#
# A small network, trained for twenty seconds on the same digits. Its flow has an exact answer too:
# its own, solved finely. So two errors can be told apart: that of the *steps* (left, against the
# network's own flow) and that of the *samples* (right, energy distance to the test images, which
# has the error of the network in it as well; the band is what as many training images reach).

# %%
torch.manual_seed(0)
torch.set_default_dtype(torch.float32)
images = x.float()
model = sg.ScoreNetwork(MLP((1, 8, 8), width=256), sde, facts=sg.Facts.of(images))
model = sg.train(model, images, recipe=sg.Recipe(steps=1500, batch=256), progress=False)
test = data.digits("test").x
noise = sg.Streams(1).start(torch.empty(400, 1, 8, 8))
own = sde.probability_flow(model)
finest = sg.grids.log_snr(sde, 200, end=last)
with torch.no_grad():
    end_of_flow = sg.solve(own, noise, finest, sg.Exponential(3, corrector=True))


def distance(samples):
    return metrics.energy_distance(samples, test)


floor = [distance(images[k::3][:400]) for k in range(3)]
by_steps, by_law = {}, {}
for name, (solver, grid) in samplers.items():
    if name.startswith("with"):  # its reference lives in float64
        continue
    for n in calls:
        y = sg.solve(own, noise, grid(n // solver.calls), solver)
        by_steps[name, n] = float((y - end_of_flow).flatten(1).square().mean(1).sqrt().median())
        by_law[name, n] = distance(y)
for n in calls:
    by_law["default, with noise (eta = 1)", n] = distance(
        sg.sample(model, 400, steps=n, eta=1.0, seed=2)
    )
print("training images:", [f"{d:.4f}" for d in floor])
for name in dict.fromkeys(name for name, _ in by_law):
    print(f"{name:32}" + "".join(f"{by_law[name, n]:9.4f}" for n in calls))
torch.set_default_dtype(torch.float64)
best = "default of sample()"
assert by_steps[best, 10] < 0.5 * by_steps["DPM-Solver++ 2M, Karras grid", 10]
noisy = "default, with noise (eta = 1)"
assert sum(by_law[noisy, n] for n in calls) > sum(by_law[best, n] for n in calls)
assert abs(by_law[best, 10] - by_law[best, 50]) < 0.002 < by_law[best, 50] - max(floor)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
for ax, table in ((left, by_steps), (right, by_law)):
    names = list(dict.fromkeys(name for name, _ in table))
    for name, colour in zip(names, plots.COLOURS, strict=False):
        width = 2.5 if "default of" in name else 1.3
        values = [table[name, n] for n in calls]
        ax.plot(calls, values, "o-", color=colour, label=name, ms=4, lw=width)
    ax.set(xlabel="calls of the network", xscale="log", xticks=calls)
    ax.set_xticklabels(calls)
    ax.minorticks_off()
left.set(yscale="log", ylabel="median error of a pixel", title="error of the steps")
right.axhspan(min(floor), max(floor), color="0.85", label="training images")
right.set(ylim=(-0.012, 0.06), ylabel="energy distance", title="error of the samples")
figure.legend(
    *right.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=4,
    frameon=False,
    fontsize="small",
)
figure

# %% [markdown]
# On the left the order of the samplers is that of the exact score. On the right the default is as
# good with ten calls as it will ever be: what is left is the network's error, which no sampler
# takes away. More calls than that are worth their time on a better network only. Noise does not
# help this network: over these numbers of calls its samples are farther from the test images.
#
# ## With noise
#
# For $\eta=1$ there is no right answer to compare with, only a right law. For Gaussian data every
# sampler is an affine map of its normals, so unit impulses (`Impulses`) give the exact variance of
# what it draws, without drawing. Data $N(0,0.3^2)$; the relative error of the variance at the end.


# %%
def drawn_variance(solver, n, eta=1.0):
    """The exact variance of the samples that a solver draws in n steps."""
    grid = sg.grids.log_snr(sde, n, end=last)
    x = torch.zeros(n + 1, 1)
    x[-1] = torch.sqrt((0.3 * sde.alpha(sde.T)) ** 2 + sde.sigma(sde.T) ** 2)
    response = sg.solve(sde.reverse(small, eta), x, grid, solver, sg.Impulses())
    return float((response**2).sum())


small = sg.Gaussian(sde, torch.zeros(1), 0.3)
right = float((0.3 * sde.alpha(last)) ** 2 + sde.sigma(last) ** 2)
stochastic = {
    "Euler-Maruyama": (sg.EulerMaruyama(), 1),
    "DDPM": (ddpm(), 1),
    "SA-Solver 2": (sa_solver(2), 2),
    "SA-Solver 3": (sa_solver(3), 2),
}
figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=120)
ax = figure.subplots()
by_law, counts = {}, (10, 20, 40, 80, 160, 320)
for (name, (solver, weak)), colour in zip(stochastic.items(), plots.COLOURS, strict=False):
    wrong = [abs(drawn_variance(solver, n) / right - 1) for n in counts]
    by_law[name] = wrong
    order = math.log2(wrong[-2] / wrong[-1])
    print(f"{name:15}" + "".join(f"{e:9.4f}" for e in wrong) + f"   order {order:.2f}")
    assert abs(order - weak) < 0.4
    ax.loglog(counts, wrong, "o-", color=colour, label=name, ms=4)
ax.set(
    xlabel="calls of the score", ylabel="relative error of the variance", title="reverse-time SDE"
)
ax.legend(frameon=False, fontsize="small")
one = drawn_variance(sg.Exponential(1, small.facts.moments), 10) / right - 1
print(f"with the variance of the data as reference, in 10 steps: {one:.0e}")
assert abs(one) < 1e-9
assert by_law["SA-Solver 2"][2] < 0.3 * by_law["DDPM"][2]
on_flow = abs(drawn_variance(sg.Exponential(2), 20, eta=0.0) / right - 1)
print(f"the same error of order 2 on the flow, at 20 calls: {on_flow:.4f}")
assert on_flow < by_law["SA-Solver 2"][1]
figure

# %% [markdown]
# Order in law is 2 at most for this kind of solver, whatever its name says, and at twenty calls
# an SDE is worse off than the flow. What it buys is that it forgets errors ([notebook
# 3](03_reversal.ipynb)). With the variance of the data known there is nothing left to err about,
# at any step size.
#
# ## Exercises
#
# **1.** Show that one single step of `Exponential(1, moments)` is exact for Gaussian data,
# whatever its length. What does DDIM (reference 0) do in one step?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
normal = sg.Gaussian(sde, torch.tensor([0.4, -0.7]), covariance=covariance)
z = sde.prior(500, 2, generator=torch.Generator().manual_seed(0))
fine = sg.solve(sde.probability_flow(normal), z, [sde.T, 0.01], sg.SciPy("DOP853", 1e-10, 1e-10))
for name, solver in (("moments", sg.Exponential(1, normal.facts.moments)), ("DDIM", ddim())):
    once = sg.solve(sde.probability_flow(normal), z, [sde.T, 0.01], solver)
    wrong = float((once - fine).abs().max())
    print(f"{name}: error of one step {wrong:.1e}, spread {float(once.std(0).mean()):.3f}")
    if name == "moments":
        assert float((once - fine).abs().max()) < 1e-7
    else:
        assert float(once.std(0).mean()) < 0.1 * float(fine.std(0).mean())  # all at the mean

# %% [markdown]
# **2.** Fit a grid to the digits' score: `sg.tune_grid(digits, steps=(8,), n=64)`. What does it
# gain at 8 calls on trajectories that it has not seen?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
tuned = sg.tune_grid(digits, steps=(8,), n=64, end=last)
print(f"{tuned.name}: error / the default grid's {tuned.ratio:.2f} (p = {tuned.p_value:.3f})")
assert tuned.ratio <= 1  # what does not win there is dropped for the default

# %% [markdown]
# **3.** The third-order curve above stops at order 3 although it starts with one step of order 1.
# Why does that not spoil it on this grid, and what must a solver do if the grid starts where the
# score already bends?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
# At T the state is almost pure noise and D almost constant: a low order costs nothing there.
# In the middle it would cost the order: so the first step is made in parts, for one more call.
middle = 0.35
x_m = sg.solve(sde.probability_flow(ring), x_T, [sde.T, middle], sg.SciPy("DOP853", 1e-11, 1e-11))
errors = []
for n in (40, 80, 160, 320):
    grid = sg.grids.log_snr(sde, n, start=middle, end=end)
    y = sg.solve(sde.probability_flow(ring), x_m, grid, sg.Exponential(3))
    errors.append(float((y - exact).norm(dim=1).mean()))
late = [math.log2(a / b) for a, b in pairwise(errors)]
print("order from T:", round(orders["Exponential(3) (order 3)"], 2))
print("orders from the middle:", [f"{p:.2f}" for p in late])
assert late[-1] > 2.8
assert sg.Exponential(3).start_calls == 1

# %% [markdown]
# ## What to remember
#
# - Measure in calls. Order is for the right of the picture, constants are for the left.
# - Solve exactly what is known: the linear part, and the covariance of the data.
# - `sample(model, n, steps=10)` does what Heun on a Karras grid does with fifty.
