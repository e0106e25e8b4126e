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
# # 10. Continuous time is a choice
#
# **DDPM counts to a thousand, EDM counts in noise, flow matching runs along straight lines. Which
# of them are different models?**
#
# None of them. They share one process, seen on five clocks and in three scalings. This notebook
# takes their published formulas one at a time (process, sampler, loss), shows that they are equal
# to rounding, and then hands one trained network round. What is left at the end is what was ever
# to be chosen: a grid, a weight, and how much noise.
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
from sde_gen import data, grids, metrics, plots
from sde_gen.networks import MLP
from sde_gen.schedules import Geometric, Tabulated
from sde_gen.training import Denoising, KarrasWeight, LogNormalTimes, flow_weight, uniform_times

torch.set_default_dtype(torch.float64)
BLUE, RED, GREEN, PINK, GOLD = plots.COLOURS[:5]

# %% [markdown]
# ## Five names
#
# Every one of them noises data by $x_t=\alpha_tx_0+\sigma_tz$. Only the two functions differ:
#
# | name | time | $\alpha$ | $\sigma$ |
# |---|---|---|---|
# | score SDE (VP), Song et al. 2021 | $t\in[0,1]$ | $e^{-B(t)/2}$ | $\sqrt{1-\alpha^2}$ |
# | DDPM, Ho et al. 2020 | $n=0\dots1000$ | $\sqrt{\bar\alpha_n}$ | $\sqrt{1-\bar\alpha_n}$ |
# | NCSN (VE), Song & Ermon 2019 | $t\in[0,1]$ | 1 | a geometric sequence |
# | EDM, Karras et al. 2022 | $\sigma$ itself | 1 | $t$ |
# | flow matching, Lipman et al. 2023 | $t\in[0,1]$ | $1-t$ | $t$ |
#
# Divide by $\alpha$. With $y=x/\alpha$ and $r=\sigma/\alpha$ each of them reads $y=x_0+r\,z$, and
# nothing is left of the five but *when* a ratio $r$ of noise to signal is reached.

# %%
betas = torch.linspace(1e-4, 0.02, 1000)
NAMES = {
    "score SDE": sg.VP(),
    "DDPM": sg.VP(Tabulated(betas, T=1000)),
    "NCSN": sg.VE(Geometric(0.002, 160.0)),
    "EDM": sg.EDM(sigma_max=160.0),
    "flow matching": sg.RectifiedFlow(),
}
x_0 = data.two_moons(1000, torch.Generator().manual_seed(0)).double()
ratio = torch.tensor([20.0, 1.0, 0.05])
z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
for name, sde in NAMES.items():
    times = sde.time_at(-2 * ratio.log())
    noised = [sde.perturb(x_0, t, torch.Generator().manual_seed(1)).x for t in times]
    pairs = zip(noised, times, ratio, strict=True)
    off = max(float((x / sde.alpha(t) - (x_0 + r * z)).abs().max()) for x, t, r in pairs)
    print(f"{name:14} r = 20, 1, 0.05 at t =", *(f"{float(t):8.4g}" for t in times), end="; ")
    print(f"x / alpha is x_0 + r z to {off:.0e}")
    assert off < 1e-10

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.2), layout="constrained", dpi=120)
left, middle, right = figure.subplots(1, 3)
for (name, sde), colour in zip(NAMES.items(), plots.COLOURS, strict=False):
    t = sde.T * torch.linspace(0.002, 0.998, 300)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    style = "--" if name == "DDPM" else "-"
    left.plot(t / sde.T, alpha, style, color=colour, lw=2)
    middle.semilogy(t / sde.T, sigma, style, color=colour, lw=2)
    right.semilogy(t / sde.T, sigma / alpha, style, color=colour, lw=2, label=name)
left.set(title=r"signal $\alpha$", xlabel="$t/T$")
middle.set(title=r"noise $\sigma$", xlabel="$t/T$")
right.set(title=r"what is left: five clocks $r=\sigma/\alpha$", xlabel="$t/T$")
right.legend(frameon=False, fontsize="small")
figure

# %% [markdown]
# ## Three samplers, one step
#
# Now the deterministic samplers, each as its paper prints it, with the network that the paper
# trains. The networks are exact here: a law of three modes, whose denoiser is known.
#
# - **DDIM**: $\hat z=\epsilon_\theta(x,n)$, then
#   $x'=\sqrt{\bar\alpha'}\,\hat x_0+\sqrt{1-\bar\alpha'}\,\hat z$.
# - **EDM**: $x'=x+(\sigma'-\sigma)\,(x-D_\theta(x,\sigma))/\sigma$, Euler's method in $\sigma$.
# - **Flow matching**: $x'=x+(t'-t)\,u_\theta(x,t)$, Euler's method in $t$, along straight lines.

# %%
MEANS = torch.tensor([[-1.0, -0.4], [0.3, 0.9], [0.9, -0.5]])


def law(sde):
    """Three modes, noised by a process."""
    return sg.GaussianMixture(sde, [0.3, 0.4, 0.3], MEANS, 0.15)


def ddim(y, steps):
    """Song, Meng & Ermon 2021, equation 12 without noise."""
    p, abar = law(NAMES["DDPM"]), torch.cat([torch.ones(1), torch.cumprod(1 - betas, 0)])
    x = abar[steps[0]].sqrt() * y
    for n, m in pairwise(steps):
        z = -(1 - abar[n]).sqrt() * p(x, n)
        x_0 = (x - (1 - abar[n]).sqrt() * z) / abar[n].sqrt()
        x = abar[m].sqrt() * x_0 + (1 - abar[m]).sqrt() * z
    return x


def edm(x, sigmas):
    """Karras et al. 2022, algorithm 1 without its correction."""
    p = law(NAMES["EDM"])
    for a, b in pairwise(sigmas):
        x = x + (b - a) * (x - p.denoise(x, a)) / a
    return x


def flow_matching(y, times):
    """Lipman et al. 2023, the other way round: t falls from noise to data."""
    p = law(NAMES["flow matching"])
    x = (1 - times[0]) * y
    for a, b in pairwise(times):
        x_0 = p.denoise(x, a)
        u = (x - (1 - a) * x_0) / a - x_0  # E[z - x_0 | x]
        x = x + (b - a) * u
    return x


def score_sde(y, times):
    """Song et al. 2021: Euler's method for the probability flow, in t."""
    p = law(NAMES["score SDE"])
    flow = NAMES["score SDE"].probability_flow(p)
    x = NAMES["score SDE"].alpha(times[0]) * y
    for a, b in pairwise(times):
        x = x + (b - a) * flow.drift(x, a)
    return x


def nodes(count):
    """So many of DDPM's thousand steps and n = 0: n, and their ratios r."""
    n = torch.linspace(980, 1, count).round().long()
    r = NAMES["DDPM"].sigma(n) / NAMES["DDPM"].alpha(n)
    return torch.cat([n, n.new_zeros(1)]), torch.cat([r, r.new_zeros(1)])


n, r = nodes(20)
y = r[0] * torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
flow = NAMES["EDM"].probability_flow(law(NAMES["EDM"]))
fine = grids.log_snr(NAMES["EDM"], 400, start=float(r[0]), end=1e-3, to_zero=True)
truth = sg.solve(flow, y, fine, sg.Exponential(3))
ends = {
    "DDIM": ddim(y, n),
    "EDM, Euler": edm(y, r),
    "flow matching, Euler": flow_matching(y, r / (1 + r)),
    "sg.Exponential(1)": sg.solve(flow, y, r, sg.Exponential(1)),
    "score SDE, Euler in t": score_sde(y, grids.from_table(NAMES["score SDE"], r)),
}
gap = {name: float((x - ends["DDIM"]).abs().max()) for name, x in ends.items()}
for name, x in ends.items():
    error = float((x - truth).norm(dim=1).mean())
    print(f"{name:22} differs from DDIM by {gap[name]:.0e}, mean error {error:.4f}")
assert max(gap[name] for name in list(ends)[:4]) < 1e-9
assert gap["score SDE, Euler in t"] > 0.1

# %% [markdown]
# Three papers, one sampler, to rounding. It is `Exponential(1)` here: hold $D$, and therefore
# $\hat z$, for the length of a step, and go where the state is $\alpha'D+\sigma'\hat z$. Two of
# the papers call it Euler's method, because in their scaling that line is straight. What is *not*
# the same is Euler's method in the time of the score SDE: there a state whose $D$ does not change
# runs along a bend. That is another sampler (on these nodes even a better one: no rule says that
# the straight line wins). So it matters which variable is stepped, and not which model.
#
# ## Straight lines are a matter of scaling
#
# Flow matching is said to have straight paths. Here are thirty-two trajectories of one flow, of
# three modes on a line, drawn in three scalings: the *same* points, multiplied by $\alpha$.

# %%
edm_1 = sg.EDM(sigma_max=20.0)
SCALINGS = {
    "EDM: $y$ over $r$": (lambda r: torch.ones_like(r), lambda r: r),
    "flow matching: $x$ over $t$": (lambda r: 1 / (1 + r), lambda r: r / (1 + r)),
    "score SDE: $x$ over the angle": (lambda r: 1 / torch.sqrt(1 + r**2), torch.atan),
}


def paths_of(p, count=32):
    """Ratios, and y along the flow from even quantiles of the noise."""
    r = torch.cat([torch.logspace(math.log10(20), -2, 200), torch.zeros(1)])
    start = 20.0 * torch.special.ndtri((torch.arange(count) + 0.5) / count)[:, None]
    flow = edm_1.probability_flow(p)
    return r, sg.solve(flow, start, r, sg.Exponential(3), trajectory=True)[..., 0]


def bend(clock, x):
    """How far paths leave the chord between their ends, at most, over the spread of the data."""
    share = ((clock - clock[0]) / (clock[-1] - clock[0]))[:, None]
    return float((x - torch.lerp(x[:1], x[-1:], share)).abs().max() / 0.8)


line = sg.GaussianMixture(edm_1, [0.3, 0.4, 0.3], torch.tensor([[-1.0], [0.1], [1.0]]), 0.1)
point = sg.GaussianMixture(edm_1, [1.0], torch.tensor([[0.5]]), 1e-6)
r_1, flow_paths = paths_of(line)
bends = {}
for label, p in {"three modes": flow_paths, "one point": paths_of(point)[1]}.items():
    for name, (scale, clock) in SCALINGS.items():
        bends[label, name] = bend(clock(r_1), scale(r_1)[:, None] * p)
        print(f"{label:12} {name:30} leaves its chord by {bends[label, name]:.4f}")
edm_name, flow_name, sde_name = SCALINGS
assert max(bends["one point", edm_name], bends["one point", flow_name]) < 1e-3
assert bends["one point", sde_name] > 0.1
assert bends["three modes", flow_name] > 0.1

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.2), layout="constrained", dpi=120)
for ax, (name, (scale, clock)) in zip(figure.subplots(1, 3), SCALINGS.items(), strict=True):
    ax.plot(clock(r_1), scale(r_1)[:, None] * flow_paths, color=BLUE, lw=0.8)
    ax.set_title(name, fontsize="medium")
    ax.invert_xaxis()
figure

# %% [markdown]
# If the data were one point all paths would be straight, in flow matching *and* in EDM, whose
# state is $y=x_0+rz$; only on the circle $\alpha^2+\sigma^2=1$ they are arcs. Of any other law no
# scaling makes them straight: they bend where the modes part, in all three pictures (in EDM's that
# is the last twentieth).
#
# ## Three losses, one loss
#
# DDPM trains $|z-\hat z|^2$ at a whole number $n$, EDM a weighted $|x_0-D|^2$ at a log-normal
# $\sigma$, flow matching $|u-\hat u|^2$ at an even $t$. One draw of $x_0$ and $z$, one denoiser,
# three formulas:

# %%
g = torch.Generator().manual_seed(3)
x_0 = law(sg.EDM()).sample(1000, g)
n = torch.randint(20, 950, (1000,), generator=g)
r, c = NAMES["DDPM"].sigma(n) / NAMES["DDPM"].alpha(n), 0.5
z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(4))
y = x_0 + r[:, None] * z
D = law(NAMES["EDM"]).denoise(y, r)
z_hat = (y - D) / r[:, None]
printed = {
    "DDPM": (z - z_hat).square().mean(1),
    "EDM": (r**2 + c**2) / (r * c) ** 2 * (x_0 - D).square().mean(1),
    "flow matching": ((z - x_0) - (z_hat - D)).square().mean(1),
}
WEIGHTS = {
    "DDPM": sg.training.uniform_weight,
    "EDM": KarrasWeight(c),
    "flow matching": flow_weight,
}
for name, weight in WEIGHTS.items():
    for other, sde in NAMES.items():
        t = sde.time_at(-2 * r.log())
        same = torch.Generator().manual_seed(4)
        loss = sg.dsm_loss(law(sde), sde, x_0, t, weight, same)
        off = float((loss / printed[name] - 1).abs().max())
        assert off < 1e-6, (name, other, off)
    print(f"{name:14} mean loss {printed[name].mean():.4f}, the same under all five processes")
assert torch.allclose(printed["DDPM"] * (1 + r) ** 2, printed["flow matching"])

# %% [markdown]
# In terms of the noise the three weigh an error by $1$, $1+r^2/c^2$ and $(1+r)^2$. The rest of a
# recipe is the density of the levels. In $\ell=\log r$ an even $t$ of flow matching is the
# logistic density $1/(2\cosh\frac\ell2)^2$, and the logit-normal $t$ of Esser et al. (2024) is a
# normal one: EDM's, with other numbers. Weight times density is all that a training knows of its
# name.

# %%
u = (torch.arange(1000) + 0.5) / 1000
straight, ends_at = NAMES["flow matching"], 0.005
t = LogNormalTimes(0.0, 1.0)(straight, u)
assert torch.allclose(torch.logit(t), torch.special.ndtri(u), atol=1e-5)
ell = torch.linspace(math.log(0.005), math.log(100.0), 400)


def density(sde):
    """Of log r, when t is drawn evenly: |dt / d log r|, by differences."""
    t = sde.time_at(-2 * torch.stack([ell + 1e-4, ell - 1e-4]))
    return (t[0] - t[1]) / 2e-4 / sde.T


def normal(mean, std):
    return torch.exp(-0.5 * ((ell - mean) / std) ** 2) / std / math.sqrt(2 * math.pi)


logistic = 1 / (2 * torch.cosh(ell / 2)) ** 2
assert torch.allclose(density(straight), logistic, atol=1e-6)
e = torch.exp(ell)
flat = 1 + (e / c) ** 2  # EDM's weight: what an untrained, preconditioned network owes is even
RECIPES = {
    "DDPM: even $n$, error of $z$": density(NAMES["DDPM"]) / flat,
    r"EDM: log-normal $\sigma$, error of $F$": normal(-1.2, 1.2),
    "flow matching: even $t$, error of $u$": logistic * (1 + e) ** 2 / flat,
    "the same, logit-normal $t$": normal(0.0, 1.0) * (1 + e) ** 2 / flat,
}
peaks = {name: float(e[share.argmax()]) for name, share in RECIPES.items()}
for name, at in peaks.items():
    print(f"{name:40} looks hardest at r = {at:.2f}")
at_ddpm, at_edm, at_flow, at_normal = peaks.values()
assert abs(math.log(at_edm) + 1.2) < 0.03
assert at_edm < at_ddpm < at_flow < at_normal < 1

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(7.5, 3.3), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, share), colour in zip(RECIPES.items(), (RED, PINK, GOLD, GREEN), strict=True):
    ax.semilogx(e, share / torch.trapezoid(share, ell), color=colour, lw=2, label=name)
ax.set(xlabel=r"noise to signal $r$", title="where four recipes look", yticks=[])
ax.legend(frameon=False, fontsize="small", loc="upper right")
figure

# %% [markdown]
# ## One network, five names
#
# A small network, trained as flow matching: straight paths, even $t$, the error of $u$. It is then
# read under the other four processes, none of which it has seen. `model.under(sde)` changes the
# clock and the scaling, and no weight.

# %%
moons = data.two_moons(4000, torch.Generator().manual_seed(6))
torch.manual_seed(0)
trained = sg.train(
    sg.ScoreNetwork(MLP((2,), 96, 2).float(), straight, "flow", facts=sg.Facts.of(moons)),
    moons,
    recipe=sg.Recipe(steps=1500, batch=256),
    objective=Denoising(flow_weight, uniform_times),
    progress=False,
)
fresh = data.two_moons(4000, torch.Generator().manual_seed(7))
ratios = torch.cat([torch.logspace(math.log10(100), math.log10(0.02), 30), torch.zeros(1)])
drawn, noisy, bits = {}, {}, {}
for name, sde in NAMES.items():
    model, times = trained.under(sde), grids.from_table(sde, ratios)
    start = (
        100.0
        * sde.alpha(times[0])
        * torch.randn(2000, 2, generator=torch.Generator().manual_seed(8))
    )
    flow = sde.probability_flow(model)
    drawn[name] = sg.solve(flow, start.float(), times, sg.Exponential(2))
    noisy[name] = sg.solve(sde.reverse(model, 1.0), start.float(), times, sg.Exponential(2), 9)
    off = float((drawn[name] - drawn["score SDE"]).abs().max())
    away = [float(metrics.energy_distance(x, fresh)) for x in (drawn[name], noisy[name])]
    print(
        f"{name:14} samples differ by {off:.0e}; energy distance to the data {away[0]:.4f}", end=""
    )
    print(f", with noise {away[1]:.4f}")
    assert off < 1e-2
    assert max(away) < 0.02

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 2.6), layout="constrained", dpi=120)
clouds = {"data": moons[:2000], **drawn}
for ax, (name, cloud) in zip(figure.subplots(1, 6, sharey=True), clouds.items(), strict=True):
    ax.scatter(*cloud.T, s=1.5, color=plots.QUIET if name == "data" else BLUE, lw=0)
    ax.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-1.9, 1.9), ylim=(-1.4, 1.4))
figure

# %% [markdown]
# ## What there is to choose
#
# The grid, first of all. Below the step is the same for all (`Exponential(1)`, that is DDIM), the
# score is exact, and each name brings the nodes that its paper would take. Beside them what a
# second value in each step does, on the grid of EDM.

# %%
EDM, DDPM = NAMES["EDM"], NAMES["DDPM"]
top, p = float(nodes(2)[1][0]), law(NAMES["EDM"])
y = top * torch.randn(300, 2, generator=torch.Generator().manual_seed(10))
flow = EDM.probability_flow(p)
exact = sg.solve(flow, y, grids.log_snr(EDM, 400, start=top, end=1e-3, to_zero=True),
                 sg.Exponential(3))  # fmt: skip


def flow_nodes(count, shift=1.0):
    """Even times of flow matching, with the shift of Esser et al.: t -> s t / (1 + (s - 1) t)."""
    t = torch.linspace(top / (shift + top), 0, count + 1)
    t = shift * t / (1 + (shift - 1) * t)
    return t / (1 - t)


GRIDS = {
    "DDPM, even $n$": lambda k: nodes(k)[1],
    "flow matching, even $t$": flow_nodes,
    "flow matching, shift 3": lambda k: flow_nodes(k, 3.0),
    r"EDM, $\rho=7$": lambda k: grids.karras(EDM, k, start=top, end=0.002, to_zero=True),
}
COUNTS = (5, 10, 20, 40, 80)
errors = {}
for name, grid in GRIDS.items():
    for order in (1, 2) if "EDM" in name else (1,):
        label = name if order == 1 else f"{name}, two values"
        errors[label] = [
            float((sg.solve(flow, y, grid(k), sg.Exponential(order)) - exact).norm(dim=1).mean())
            for k in COUNTS
        ]
        print(f"{label:28}", " ".join(f"{v:.4f}" for v in errors[label]))
*one, two = errors.values()
assert max(v[1] for v in one) > 2 * min(v[1] for v in one)  # names differ by their grids
assert two[-1] < min(v[-1] for v in one) / 3  # by 80 calls an order is worth more
assert two[0] > min(v[0] for v in one)  # at 5 it is not

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(7.5, 3.5), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, values), colour in zip(errors.items(), (RED, GOLD, GREEN, PINK, BLUE), strict=True):
    ax.loglog(COUNTS, values, "o-", color=colour, lw=2, ms=4, label=name)
ax.set(xlabel="calls of the network", title="mean error of a sample")
ax.set_xticks(COUNTS, list(map(str, COUNTS)))
ax.minorticks_off()
ax.legend(frameon=False, fontsize="small")
figure

# %% [markdown]
# At ten calls the grids of the names are apart by a factor of two and more, on this law; on
# another their order is another. An order more costs nothing and wins, but not before the steps
# are short enough for it. `sample` and `tune_solver` choose both.
#
# ## Exercises
#
# **1.** *A wrapper that works at small noise.* A flow network $u(x,t)$ is to serve an EDM sampler,
# which asks for $D(y,\sigma)$. Below is such a wrapper. Where is the fault, and why do samples
# look almost right?

# %%
u_exact = straight.probability_flow(law(straight)).drift


def wrapped(y, sigma):
    """D(y, sigma) of a flow network."""
    t = sigma / (1 + sigma)
    return y - sigma * u_exact(y, t)


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def mended(y, sigma):
    """The network sees x = (1 - t) y, and D = x - t u."""
    t = sigma / (1 + sigma)
    x = (1 - t) * y
    return x - t * u_exact(x, t)


miss = {}
for sigma in (0.01, 0.1, 1.0):
    points = p.sample(500, torch.Generator().manual_seed(11))
    y = points + sigma * torch.randn(500, 2, generator=torch.Generator().manual_seed(12))
    D = p.denoise(y, sigma)
    miss[sigma] = float((wrapped(y, sigma) - D).norm(dim=1).mean())
    print(f"sigma = {sigma}: wrapper off by {miss[sigma]:.4f}", end=", ")
    print(f"mended {float((mended(y, sigma) - D).abs().max()):.0e}")
    assert (mended(y, sigma) - D).abs().max() < 1e-9
print("The time was converted and the state was not: 1 - t is nearly 1 where noise is small.")
assert miss[0.01] < 0.05 < miss[1.0]

# %% [markdown]
# **2.** *The shift.* Large pictures want more steps at much noise, so flow models shift their
# times, $t'=st/(1+(s-1)t)$. What does this do to $r$? And what if a pipeline shifts times that its
# scheduler has shifted already?


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def shift(t, s):
    return s * t / (1 + (s - 1) * t)


t = torch.linspace(0.01, 0.99, 50)
odds = t / (1 - t)
once, twice = shift(t, 3.0), shift(shift(t, 3.0), 3.0)
print("r becomes s r, and shifted twice s^2 r: a shift is a change of units, 3 becomes 9.")
assert torch.allclose(once / (1 - once), 3 * odds)
assert torch.allclose(twice / (1 - twice), 9 * odds)
assert torch.allclose(twice, shift(t, 9.0))

# %% [markdown]
# **3.** *A third scaling.* On the circle, $\alpha=\cos\phi$ and $\sigma=\sin\phi$, Salimans & Ho
# (2022) predict $v=\alpha z-\sigma x_0=\mathrm dx/\mathrm d\phi$. Write the step of DDIM from
# $\phi$ to $\phi'$ with $x$ and $v$ alone. Is it Euler's method in $\phi$?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
# D cos(phi) + z sin(phi) turns with its tangent: x' = cos(d) x + sin(d) v, d = phi' - phi.
vp = NAMES["score SDE"]
q, phi = law(vp), torch.tensor([1.2, 0.9])
t = vp.time_at(-2 * torch.log(torch.tan(phi)))
x = phi[0].cos() * y + phi[0].sin() * torch.ones_like(y)
D = q.denoise(x, t[0])
z = (x - phi[0].cos() * D) / phi[0].sin()
v, d = phi[0].cos() * z - phi[0].sin() * D, phi[1] - phi[0]
turned, euler = d.cos() * x + d.sin() * v, x + d * v
ddim_step = sg.solve(vp.probability_flow(q), x, t, sg.Exponential(1))
print(f"turned by v: off by {float((turned - ddim_step).abs().max()):.0e};", end=" ")
print(f"Euler in the angle: {float((euler - ddim_step).abs().max()):.3f}")
assert torch.allclose(turned, ddim_step, atol=1e-9)
assert (euler - ddim_step).abs().max() > 1e-2

# %% [markdown]
# ## What to remember
#
# - Divide by $\alpha$: every Gaussian noising is $y=x_0+rz$, and a name is a clock for $r$.
# - DDIM, Euler in $\sigma$ and Euler of flow matching are one step. Euler in another variable is
#   another step.
# - Losses differ by a weight, and a training by weight times density of $\log r$.
# - A trained denoiser belongs to no name. Choose the grid, the order and the noise; time, with its
#   thousand steps or none, is only how you write them down.
