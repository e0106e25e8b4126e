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
# # 9. Likelihood, encoding, editing
#
# **A flow turns pictures into noise and back, and loses nothing on the way. How probable is a
# picture, how sure is that number, and what can be done in between?**
#
# [Notebook 3](03_reversal.ipynb) has the probability flow, the ODE whose points have the same laws
# as the diffusion. An ODE is a bijection, and two things follow: densities can be computed, and
# pictures edited. First laws in the plane, where the answers are known; then digits.
#
# *Needs `sde-gen[data]` and nothing else; runs in two minutes on one CPU core.*

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
from sde_gen import data, plots
from sde_gen.likelihood import between, decode, encode, importance_bounds, redraw, relabel
from sde_gen.metrics import energy_distance
from sde_gen.networks import UNet
from sde_gen.training import Denoising, LogNormalTimes

torch.set_default_dtype(torch.float64)
BLUE, RED, GREEN, PINK, GOLD = plots.COLOURS[:5]

# %% [markdown]
# ## Two ways to add noise
#
# Where does the flow come from? Add a little noise to every point of a cloud, $x+\gamma\epsilon$:
# the cloud gets wider. Now move every point, without any chance, *down* its own density,
# $x-\frac{\gamma^2}2\nabla\log p(x)$. Points move quite differently. The law does not, to first
# order in $\gamma^2$:
#
# $$p+\frac{\gamma^2}2\Delta p\qquad\text{and}\qquad
#   p+\mathrm{div}\Big(p\;\frac{\gamma^2}2\nabla\log p\Big)=p+\frac{\gamma^2}2\Delta p.$$
#
# For $\mathcal N(0,v)$ the one has variance $v+\gamma^2$, the other
# $v+\gamma^2+\gamma^4/4v$.


# %%
def ground(ax, log_density, size):
    """Contours of a density on [-size, size]^2, grey."""
    u = torch.linspace(-size, size, 120)
    mesh = torch.stack(torch.meshgrid(u, u, indexing="xy"), -1).reshape(-1, 2)
    ax.contourf(u, u, log_density(mesh).exp().reshape(120, 120), 10, cmap="Greys", alpha=0.7)
    ax.set(aspect="equal", xticks=[], yticks=[])


edm = sg.EDM()
angle = torch.arange(5) * 2 * math.pi / 5
ring = sg.GaussianMixture(
    edm, torch.ones(5), torch.stack([angle.cos(), angle.sin()], 1), torch.tensor(0.22)
)
cloud = ring.sample(600, torch.Generator().manual_seed(0))
gamma = 0.25
noised = cloud + gamma * torch.randn(600, 2, generator=torch.Generator().manual_seed(1))
moved = cloud - gamma**2 / 2 * ring(cloud, 0.0)


def gap(law, gamma):
    """The 2-Wasserstein distance, on the line, of the two laws that a step of gamma makes."""
    u = (torch.arange(4000) + 0.5) / 4000
    line = torch.linspace(-6, 6, 60_001)

    def quantiles(std):
        cdf = torch.special.ndtr((line[:, None] - law.means[:, 0]) / std) @ law.log_weights.exp()
        i = torch.searchsorted(cdf, u).clamp(1, len(line) - 1)
        share = (u - cdf[i - 1]) / (cdf[i] - cdf[i - 1])
        return torch.lerp(line[i - 1], line[i], share)

    x, std = quantiles(law.variance[0].sqrt()), law.variance[0]
    step = x - gamma**2 / 2 * law(x[:, None], 0.0)[:, 0]
    return float((step.sort().values - quantiles((std + gamma**2).sqrt())).square().mean().sqrt())


pair = sg.GaussianMixture(edm, [0.4, 0.6], torch.tensor([[-1.0], [1.0]]), 0.5)
steps = torch.tensor([0.1, 0.14, 0.2, 0.28, 0.4])
gaps = [gap(pair, float(s)) for s in steps]
order = math.log(gaps[2] / gaps[0]) / math.log(2)
print(f"the two laws differ by gamma^{order:.2f}")
assert abs(order - 4) < 0.2

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12.5, 3.7), layout="constrained", dpi=120)
left, middle, right = figure.subplots(1, 3)
for ax, end, title in (
    (left, noised, r"$x+\gamma\,\epsilon$"),
    (middle, moved, r"$x-\frac{1}{2}\gamma^2\nabla\log p(x)$"),
):
    ground(ax, lambda x: ring.log_prob(x, gamma), 1.9)
    start, way = cloud[:160].T, (end - cloud)[:160].T
    ax.quiver(*start, *way, angles="xy", scale_units="xy", scale=1, width=4e-3, color=RED)
    ax.scatter(*start, s=5, color="black", zorder=3)
    ax.set(title=title)
right.loglog(steps, gaps, "o-", color=BLUE, lw=2, label="two modes on the line")
right.loglog(
    steps,
    (0.5 + steps**2 / (2 * 0.5) - (0.25 + steps**2).sqrt()).abs(),
    color=RED,
    lw=2,
    label=r"$\mathcal{N}(0,0.25)$, exact",
)
right.set(xlabel=r"$\gamma$", title="distance of the two laws")
right.set_xticks(steps.tolist(), [f"{s:g}" for s in steps.tolist()])
right.minorticks_off()
right.legend(frameon=False)
figure

# %% [markdown]
# Grey is the law that both make. Repeat the second step, with the score of the law as
# it is by then, and let $\gamma\to0$: $\mathrm dx=-\frac12\nabla\log p_w(x)\,\mathrm dw$ with
# $w$ the variance that was added. That is the probability flow, and there is no chance in it.
#
# ## Change of variables
#
# Let $z=f(x)$ be where the flow takes $x$. Then
#
# $$\log p(x)=\log p_T(z)+\log|\det f'(x)|,$$
#
# and step by step, $\frac{\mathrm d}{\mathrm dt}\log p_t(x_t)=-\mathrm{div}\,v(x_t,t)$ along
# $\dot x=v$: where the flow spreads points, density falls. Small circles on the left, and where
# they come to lie in the latent space:

# %%
sde = sg.VP()
law = sg.GaussianMixture(
    sde, [0.5, 0.3, 0.2], torch.tensor([[-0.9, 0.3], [0.8, 0.7], [0.5, -0.9]]), 0.3
)
centres = torch.tensor([[-0.9, 0.3], [-0.1, 0.5], [0.8, 0.7], [0.5, -0.9], [-0.2, -0.5]])
turn = torch.linspace(0, 2 * math.pi, 60)
circle = 0.12 * torch.stack([turn.cos(), turn.sin()], 1)
outline = (centres[:, None] + circle).reshape(-1, 2)
image = encode(law, outline).reshape(5, 60, 2)

latent = encode(law, centres)
slopes = torch.stack(
    [torch.autograd.functional.jacobian(lambda x: encode(law, x[None])[0], c) for c in centres]
)
by_volume = -0.5 * (latent.square() + math.log(2 * math.pi)).sum(1) + slopes.det().log()
exact = law.log_prob(centres, 0.0)
by_flow = sg.log_prob(law, centres)
print("by the determinant", [f"{v:.4f}" for v in by_volume.tolist()])
print("by the divergence ", [f"{v:.4f}" for v in by_flow.value.tolist()])
print("exact             ", [f"{v:.4f}" for v in exact.tolist()])
assert (by_volume - exact).abs().max() < 5e-3  # p_T is not quite N(0, I)
assert (by_flow.value - exact).abs().max() < 5e-4

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8.6, 4.2), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
ground(left, lambda x: law.log_prob(x, 0.0), 1.7)
ground(right, lambda x: -x.square().sum(1) / 2, 2.2)
left.set(title="data")
right.set(title="latents")
for i, (shape, ends) in enumerate(zip(outline.reshape(5, 60, 2), image, strict=True)):
    name = "abcde"[i]
    left.plot(*shape.T, color=RED, lw=2)
    area = f"{name}, area x {float(slopes[i].det()):.2g}"
    left.text(float(centres[i, 0]), float(centres[i, 1]) - 0.32, area, color=BLUE, ha="center")
    right.plot(*ends.T, color=RED, lw=2)
    right.text(*(ends.max(0).values + 0.03), name, color=BLUE)
figure

# %% [markdown]
# ## A trace, by asking at random
#
# The divergence is the trace of an $n\times n$ matrix $J=\partial s/\partial x$, and a network
# gives products $J^\top u$, not $J$. But $\mathrm E\,u^\top Ju=\mathrm{tr}\,J$ for every $u$ of
# independent coordinates with variance 1. Signs $\pm1$ spread less than normal numbers, since they
# ask for the diagonal exactly. And whatever is known in closed form need not be asked: take away
# the $J$ of a Gaussian of the same covariance, whose whole contribution is a known logarithm.

# %%
n = 16
g = torch.Generator().manual_seed(2)
wide = torch.linspace(1.0, 0.15, n)
R = torch.linalg.qr(torch.randn(n, n, generator=g))[0]  # directions of their own
means = wide * torch.randn(3, n, generator=g) @ R.T
many = sg.CorrelatedMixture(sde, [0.4, 0.35, 0.25], means, R @ torch.diag(wide**2 / 4) @ R.T)
x = many.sample(64, g)
many = many.with_facts(sg.Facts.of(many.sample(20_000, g), rank=n))  # their covariance
t = torch.tensor(0.1)
alpha, sigma = sde.alpha(t), sde.sigma(t)
x_t = sde.perturb(x, t, torch.Generator().manual_seed(3)).x
jacobian = torch.autograd.functional.jacobian
J = torch.stack([jacobian(lambda y: many(y[None], t)[0], y) for y in x_t])
known = many.facts.moments
C = known.basis @ torch.diag(known.values[1:]) @ known.basis.T
reference = -torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(n))
u = {"normal": torch.randn(500, n, generator=g)}
u["signs"] = u["normal"].sign()
found = {
    "normal numbers": torch.einsum("ki,bij,kj->bk", u["normal"], J, u["normal"]),
    "signs": torch.einsum("ki,bij,kj->bk", u["signs"], J, u["signs"]),
    "signs, less a Gaussian": torch.einsum("ki,bij,kj->bk", u["signs"], J - reference, u["signs"])
    + reference.trace(),
}
trace = J.diagonal(dim1=1, dim2=2).sum(1)
print(f"tr J = {trace[0]:.1f} of the first; spread of one probe about it:")
for name, values in found.items():
    error = float((values.mean(1) - trace).mean())
    print(f"{name:24}{values.std(1).mean():6.2f}, mean off by {error:5.2f}")
spread = [float(v.std(1).mean()) for v in found.values()]
assert spread[0] > spread[1] > spread[2]

# %% [markdown]
# Two errors, then, and they are of different kinds. The probes *spread* a value: over many points
# that averages out. The solver's steps *bias* it, all values alike, and no average takes that
# away. An `Estimate` keeps both apart, and its standard error is the root of the sum of their
# squares. As many probes as coordinates, made orthogonal, are the exact trace.

# %%
exact = many.log_prob(x, 0.0)
probes = [1, 2, 4, 8, 16]
by_probes = {k: sg.log_prob(many, x, probes=k, steps=48, seed=4) for k in probes}
rms = {k: float((e.value - exact).square().mean().sqrt()) for k, e in by_probes.items()}
told = {k: float(e.standard_error.square().mean().sqrt()) for k, e in by_probes.items() if k > 1}

flat = law.sample(200, torch.Generator().manual_seed(5))
truth = law.log_prob(flat, 0.0)
counts = [6, 8, 12, 16, 24, 32, 48]
by_steps = {k: sg.log_prob(law, flat, steps=k) for k in counts}
off = {k: (e.value - truth).abs() for k, e in by_steps.items()}
inside = {k: float((off[k] <= e.bias + 1e-9).double().mean()) for k, e in by_steps.items()}
print("the bias lies within its bar", {k: f"{100 * v:.0f} %" for k, v in inside.items()})
assert min(list(inside.values())[2:]) > 0.85
assert all(0.6 < told[k] / rms[k] < 1.6 for k in (2, 4, 8))

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10.5, 3.5), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
left.loglog(probes, list(rms.values()), "o-", color=BLUE, lw=2, label="error, rms")
left.loglog(list(told), list(told.values()), "s:", color=RED, lw=2, label="its error bar")
left.set(title=f"spread: {n} coordinates, 48 steps", xlabel="probes", ylabel="nats")
left.set_xticks(probes, [str(k) for k in probes])
right.loglog(counts, [float(e.mean()) for e in off.values()], "o-", color=BLUE, lw=2)
right.loglog(counts, [float(e.bias.mean()) for e in by_steps.values()], "s:", color=RED, lw=2)
right.set(title="bias: exact trace", xlabel="steps")
right.set_xticks(counts, [str(k) for k in counts])
for ax in (left, right):
    ax.minorticks_off()
left.legend(frameon=False)
figure

# %% [markdown]
# ## Levels are not points
#
# Pictures come in levels $k=0..L-1$, and a density of *points* says nothing of those: a model that
# puts a spike on each level has infinite density and knows nothing. Give each level its cell, and
# fill it with noise $u$:
#
# $$\log P(k)=\log\int_\mathrm{cell}p(x)\,\mathrm dx\;\ge\;
#   \mathrm E_u[\log p(x(u))]+\log|\mathrm{cell}|.$$
#
# That is a bound, by Jensen, and with the mean of $K$ draws *inside* the logarithm a better one.
# In the plane the probability of a cell is known:

# %%
L = 8
edges = torch.linspace(-1, 1, L + 1)
inner = law.sample(4000, torch.Generator().manual_seed(6))
k = data.quantise(inner[(inner.abs() < 1).all(1)][:1000], L)
root = law.variance[0].sqrt()
low, high = (torch.special.ndtr((edges[k + i][:, None] - law.means) / root) for i in (0, 1))
P = ((high - low).prod(2) @ law.log_weights.exp()).log()
wanted = float(-P.mean() / 2 / math.log(2))
bounds = importance_bounds(law, k, L, draws=32, steps=24)
for draws, value in bounds.items():
    print(f"{draws:3d} draws: {value} bits a dimension")
print(f"    exact: {wanted:.4f}")
assert float(bounds[1]) > float(bounds[4]) > float(bounds[32]) > wanted - 3e-3

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(6.5, 3.1), layout="constrained", dpi=120)
ax = figure.subplots()
ax.semilogx(list(bounds), [float(b) for b in bounds.values()], "o-", color=BLUE, lw=2)
ax.axhline(wanted, color="black", ls=":", label="exact")
ax.set(title="8 levels, 2 pixels", xlabel="draws $K$ inside the logarithm")
ax.set_ylabel("bits a dimension")
ax.set_xticks(list(bounds), [str(d) for d in bounds])
ax.minorticks_off()
ax.legend(frameon=False)
figure

# %% [markdown]
# The last difference, the *slope*, tells how much is left to gain; here nothing, and the last
# digit is chance. (The bars are for new pictures, and all bounds are of the same ones: they are
# wider than the differences.)
#
# ## Digits
#
# A network, a minute of training, labels dropped now and then so that it can do without.

# %%
torch.set_default_dtype(torch.float32)
train, test = data.digits("train"), data.digits("test")
torch.manual_seed(0)
model = sg.train(
    sg.ScoreNetwork(UNet.digits(), sde, facts=sg.Facts.of(train.x, levels=17)),
    *train,
    recipe=sg.Recipe(steps=600, batch=128, lr=4e-3),
    objective=Denoising(times=LogNormalTimes(), dropout=0.2),
    transform=data.Dequantise(17),
    progress=False,
    device="cpu",
)

# %%
seen = slice(100)
levels, x, y = data.quantise(test.x[seen], 17), test.x[seen], test.y[seen]
given = model.given(y=y)
bits = sg.bits_per_dim(given, levels)
fixed = bits.mean(fixed=True)
print(f"{bits.mean()} bits a dimension on unseen digits, given their class, {bits.calls} calls")
print(f"data {float(bits.mean().spread):.4f}, probes {float(fixed.spread):.4f},", end=" ")
print(f"steps at most {float(fixed.bias):.4f}; levels all alike would cost {math.log2(17):.2f}")
assert float(bits.mean()) < 2.3
assert fixed.spread < bits.mean().spread / 2

order = bits.value.argsort()
extremes = torch.cat([x[order[:10]], x[order[-10:]]])
names = [f"{float(bits.value[order[i]]):.2f} bits" for i in (5, -5)]
plots.image_grid(extremes, 2, names, "the most and the least probable of 100")

# %% [markdown]
# Of the draws the *data* spread most: 100 pictures, whose bits differ. Report the bar; a third
# digit without it is decoration. And mind what the number means: plain shapes are probable, so a
# high density is no praise.
#
# ## There and back
#
# `encode` follows the flow to the noise, `decode` back. Nothing is lost but what the steps lose.
# (The model is one of filled cells. A picture whose pixels all lie in the middle of their cells is
# not typical for it: a border that is always black has a latent of 0. So fill them.)

# %%
some = torch.tensor([int((y == c).nonzero()[0]) for c in range(10)])
fill = data.Dequantise(17)
x, y = fill(x[some], torch.Generator().manual_seed(2)), y[some]
given = model.given(y=y)
for steps in (25, 50, 100):
    z = encode(given, x, steps)
    back = decode(given, z, steps)
    print(f"{steps} steps: largest error of a pixel {float((back - x).abs().max()):.1e}")
assert (back - x).abs().max() < 5e-3
filled = fill(test.x, torch.Generator().manual_seed(3))
z = encode(model.given(y=test.y), filled, 50).double()
print(f"latents of 400 digits: mean {z.mean():.3f}, variance {z.var():.3f}")
assert abs(z.mean()) < 0.1
assert 0.8 < z.var() < 1.2
z = encode(given, x)
plots.image_grid(torch.cat([x, z / 2, back]), 3, ["digit", "latent", "and back"])

# %% [markdown]
# ## Between two digits
#
# Mix two pictures, and both shine through. Mix their latents instead. A straight line between two
# latents leaves the shell of radius $\sqrt n$ where all latents live; half-way it has half the
# variance, which no latent of a picture has. Two remedies: turn on the **sphere**, or divide by
# $\sqrt{(1-c)^2+c^2}$, which is the **Gaussian metric**: of two independent normals each point is
# a normal again.

# %%
one, other = x[[0]], x[[7]]
a, b = (encode(model, v) for v in (one, other))
shares = torch.linspace(0, 1, 9)
straight = torch.stack([(1 - c) * a + c * b for c in shares])
ways = {
    "straight": straight,
    "Gaussian": between(a, b, shares, "gaussian"),
    "sphere": between(a, b, shares, "sphere"),
}
pictures = {"pixels": torch.stack([(1 - c) * one + c * other for c in shares])[:, 0]}
pictures |= {name: decode(model, path[:, 0]) for name, path in ways.items()}
for name, path in ways.items():
    first, half, last = (float(path[i].square().mean()) for i in (0, 4, 8))
    print(f"{name:9} length^2 / 64 half-way {half:.2f}, at the ends {first:.2f} and {last:.2f}")
contrast = {name: float(p[4].std()) for name, p in pictures.items()}
print("contrast half-way", {name: round(c, 2) for name, c in contrast.items()})
assert straight[4].square().mean() < 0.75 * a.square().mean()

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
plots.image_grid(torch.cat(list(pictures.values())), 4, list(pictures), ax=left)
for (name, path), style in zip(ways.items(), (":", "-", "-"), strict=True):
    flat = path.flatten(1).double()
    cosine = (flat @ flat[0]) / flat.norm(dim=1) / flat[0].norm()
    angle, colour = cosine.clamp(-1, 1).acos().rad2deg(), plots.COLOURS[len(right.lines)]
    right.plot(shares, angle, style, color=colour, lw=4 if style == ":" else 2, label=name)
right.set(xlabel="share", ylabel="degrees", title="angle from the first latent")
right.legend(frameon=False)
figure

# %% [markdown]
# The pixels fade into each other, and the contrast with them; on every path of latents a digit
# stays one until it turns into another. Sphere and Gaussian metric go the same way, at another
# pace: the one turns evenly. What the straight line costs hardly shows on pictures as small as
# these; but its middle is a state that the network was never shown.
#
# ## Another label
#
# What does a latent hold, if the label is told besides? What the label does not tell: slant,
# weight, width. Encode under one label, decode under another.

# %%
from sklearn.svm import SVC

judge = SVC(C=10).fit(train.x.flatten(1).numpy(), train.y.numpy())
sources = torch.tensor([0, 2, 4, 7, 9])
x_5, y_5 = x[sources].repeat_interleave(10, 0), y[sources].repeat_interleave(10)
targets = torch.arange(10).repeat(5)
changed = relabel(model.given(y=y_5), model.given(y=targets), x_5, steps=100)
read = torch.from_numpy(judge.predict(changed.flatten(1).numpy()))
same = targets == y_5
print(f"read as asked for: {float((read == targets).double().mean()):.0%}")
print(f"under its own label a digit comes back to {float((changed - x_5)[same].abs().max()):.1e}")
assert (read == targets).double().mean() > 0.8
assert (changed - x_5)[same].abs().max() < 0.02
rows = torch.cat([x[sources][:, None], changed.reshape(5, 10, 1, 8, 8)], 1).flatten(0, 1)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = plots.image_grid(rows, 5, [f"a {int(c)}" for c in y[sources]])
ax = figure.axes[0]
ax.set_xticks((torch.arange(11) + 0.5).numpy() * ax.get_xlim()[1] / 11, ["is", *range(10)])
ax.xaxis.tick_top()
figure

# %% [markdown]
# ## Redrawn from noise
#
# The third edit needs no encoder. Noise a picture to a level $\sigma/\alpha$, and denoise it
# (SDEdit, Meng et al. 2022). What is finer than the noise is drawn anew, what is coarser stays.
# From digits in black and white, which the network has never seen:

# %%
torch.manual_seed(1)
crude = torch.where(test.x[some] > 0, 1.0, -1.0)
LEVELS = (0.25, 0.5, 1.0, 2.0)
drawn = {level: redraw(model, crude, level, seed=3) for level in LEVELS}
kept = {level: float((v - crude).square().mean().sqrt()) for level, v in drawn.items()}
print("distance from the original", {level: round(d, 2) for level, d in kept.items()})
assert kept[0.25] < kept[1.0] < kept[2.0]

points = law.sample(4000, torch.Generator().manual_seed(7))
fresh = law.sample(4000, torch.Generator().manual_seed(8))
for level in (0.2, 1.0):
    away = energy_distance(redraw(law, points, level, seed=9), fresh)
    print(f"law of three modes, level {level}: energy distance {away:.4f}")
    assert away < 0.005
plots.image_grid(
    torch.cat([crude, *drawn.values()]), 5, ["in", *(f"level {level:g}" for level in LEVELS)]
)

# %% [markdown]
# A little noise turns them grey and smooth, as digits are; much noise forgets which digit it was.
# Of the model's own law the result has that law at *every* level; the level only says how much of
# each picture is its own.
#
# ## Exercises
#
# Each plants a fault that was published or shipped. Find it by a comparison with something exact.
#
# **1.** *The clamp that is no bound.* $L_0$ of a widely copied implementation: the probability of
# a level under a Gaussian, with an approximation of $\Phi$ and a floor under the logarithm. Is it
# a bound for every mean and std?

# %%
torch.set_default_dtype(torch.float64)


def cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def nats_of_level(k, mean, std, levels=256):
    """-log of the mass of N(mean, std^2) on the cell of level k on [-1, 1]."""
    centre, half = (2 * k + 1) / levels - 1, 1 / levels
    upper, lower = cdf((centre + half - mean) / std), cdf((centre - half - mean) / std)
    mass = torch.where(k == 0, upper, torch.where(k == levels - 1, 1 - lower, upper - lower))
    return -mass.clamp_min(1e-12).log()


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
from sde_gen.gaussians import discretised

k, std = torch.arange(256), 0.01
for mean in (0.0, 0.06, 0.094):
    value = float(nats_of_level(torch.tensor(128), torch.tensor(mean), std))
    right = -float(discretised(torch.tensor(128), torch.tensor(mean), torch.tensor(std), 256))
    print(f"mean {mean:5}: by the code {value:.2f} nats, exact {right:.2f}")
mass = float(torch.exp(-nats_of_level(k, torch.tensor(0.5), 1e-4)).sum())
print(f"masses sum to {mass:.12f}")
print("An overconfident model pays 27.6 nats at the most, however wrong it is: no bound.")
right = -float(discretised(torch.tensor(128), torch.tensor(0.094), torch.tensor(std), 256))
assert float(nats_of_level(torch.tensor(128), torch.tensor(0.094), std)) < right - 10
levels_mass = discretised(k, torch.tensor(0.5), torch.tensor(1e-4), 256).exp().sum()
assert abs(float(levels_mass) - 1) < 1e-12

# %% [markdown]
# **2.** *The forgotten entropy.* A score is singular at 0, so the flow starts at a small time
# $\epsilon$, and the last step is bounded: $-\log p(x)\le\mathrm E[-\log p_\epsilon(x_\epsilon)
# -\log p(x\mid x_\epsilon)+\dots]$. A paper had to withdraw its figures. On data
# $\mathcal N(0,\frac14)$: which term is missing, and is the figure too good or too bad?

# %%
v, eps = 0.25, 1e-3
gauss = sg.Gaussian(sde, torch.zeros(1), math.sqrt(v))


def nats(x, g):
    """A bound on -log p(x), from the likelihood of the flow at eps."""
    alpha, sigma = float(sde.alpha(eps)), float(sde.sigma(eps))
    x_eps = alpha * x + sigma * torch.randn(x.shape, generator=g)
    p = torch.distributions.Normal(gauss.denoise(x_eps, eps), sigma / alpha)  # p(x | x_eps)
    return -(gauss.log_prob(x_eps, eps) + p.log_prob(x).sum(1))


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
g = torch.Generator().manual_seed(10)
points = gauss.sample(4000, g)
entropy = 0.5 * math.log(2 * math.pi * math.e * v)
by_code = float(nats(points, g).mean())
noise_entropy = 0.5 * math.log(2 * math.pi * math.e * float(sde.sigma(eps)) ** 2)
print(f"by the code {by_code:.3f} nats, the entropy of the data {entropy:.3f}: below it, no bound")
print(f"with E log q(x_eps | x) = {-noise_entropy:.3f} it is {by_code - noise_entropy:.3f}")
assert by_code < entropy - 1
assert abs(by_code - noise_entropy - entropy) < 0.05

# %% [markdown]
# **3.** *Noise inside the logarithm.* Probes give $\log p$ without bias, $K$ draws inside the
# logarithm give a tighter bound. So combine the two, on points whose density is known: of each
# point the mean of $K=16$ estimates of $p$, one probe each. What comes out? (`bits_per_dim`
# refuses to.)


# %%
def log_mean(points, draws):
    """log of the mean of p over ``draws`` estimates with a probe each."""
    logs = [sg.log_prob(many, points, probes=1, steps=32, seed=s).value for s in range(draws)]
    return torch.stack(logs).logsumexp(0) - math.log(draws), torch.stack(logs).mean(0)


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
points = many.sample(40, torch.Generator().manual_seed(11))
inside, outside = log_mean(points, 16)
exact = many.log_prob(points, 0.0)
print(f"nats over the exact log p: mean of the logs {float((outside - exact).mean()):.2f},")
print(f"log of the mean {float((inside - exact).mean()):.2f}")
print("E exp of something unbiased is too large, by half its variance if it is normal: the spread")
print("of the probes passes for likelihood.")
assert (inside - exact).mean() > 0.3
assert abs((outside - exact).mean()) < 0.3 * float((inside - exact).mean())

# %% [markdown]
# ## What to remember
#
# - Moving down the density by $\frac{\gamma^2}2\nabla\log p$ does to a law what noise does,
#   without chance. That is the flow.
# - A likelihood is a number with an error bar. Probes and data spread it, steps bias it, and the
#   data are mostly the largest part.
# - Levels need cells. Bounds are bounds in the mean; whatever is noisy must stay outside the
#   logarithm.
# - A latent holds what the label does not tell. Stay on the shell, and pictures stay pictures.
