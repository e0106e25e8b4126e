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
# # 12. How many bits is a latent?
#
# **An autoencoder turns a picture into a few real numbers. A real number can hold any number of
# bits. So what was saved, who pays for it, and in what unit?**
#
# The answer is noise: a number that is known to within $\sigma$ holds finitely many bits, and how
# many depends on what else is known about it, the *prior*. First latents whose prior is known
# exactly; then digits, with a latent diffusion model that `benchmarks/generators.py` trained.
#
# *Needs `sde-gen[data]` and the folder `checkpoints`; runs in half a minute on one CPU core.*

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
import itertools
import math

import torch
from matplotlib.figure import Figure

import sde_gen as sg
from sde_gen import data, latent, plots
from sde_gen.data import quantise
from sde_gen.latent import LatentModel
from sde_gen.likelihood import redraw
from sde_gen.networks import Pair
from sde_gen.training import load

BLUE, RED, GREEN, PINK, GOLD = plots.COLOURS[:5]
BIT = math.log(2)

# %% [markdown]
# ## One number
#
# The encoder does nothing, $c=x$, and the latent is $z=c+\sigma\epsilon$. Under a prior $p(z)$ the
# latent of $x$ costs $\mathrm{KL}(q(z\mid x)\,\|\,p(z))$, and if $p$ is the law of all latents the
# mean cost is the mutual information of $x$ and $z$. For $x\sim\mathcal N(0,1)$ that is
# $\frac12\log_2(1+1/\sigma^2)$ bits. `latent.bound` does not know this formula: it follows the
# path of a diffusion model and adds up what the denoiser does not know,
#
# $$\text{rate}=\mathrm{KL}(q(x_T\mid x)\,\|\,p_T)+\frac12\int_{\sigma^2}^\infty
#   \mathrm E|c-D(y)|^2\,\frac{\mathrm dw}{w^2},\qquad y=c+\sqrt w\,\epsilon.$$
#
# The other two laws below are two and four narrow peaks, of the same variance.

# %%
sde = sg.VP()
PEAK = 0.02


def peaks(k):
    """k equally likely narrow normal laws, of variance 1 together."""
    at = torch.arange(k, dtype=torch.float64) - (k - 1) / 2
    at = at / at.square().mean().sqrt() * math.sqrt(1 - PEAK**2)
    return sg.GaussianMixture(sde, [1 / k] * k, at[:, None], PEAK)


def of_one(law, std):
    """The model of latents x + std e, x from this law."""
    return LatentModel(Pair(lambda x: x, lambda z: z, (1,), (1,), std=std).double(), law)


def information(law, std):
    """Mutual information of x and x + std e in bits, by quadrature."""
    z = torch.linspace(-12, 12, 80_001, dtype=torch.float64)
    v = law.variance.flatten()[0] + std**2
    parts = -0.5 * (z[:, None] - law.means.flatten()) ** 2 / v - 0.5 * torch.log(2 * math.pi * v)
    log_p = torch.logsumexp(parts + law.log_weights, 1)
    entropy = -float(torch.trapezoid(log_p.exp() * log_p, z))
    return (entropy - 0.5 * math.log(2 * math.pi * math.e * std**2)) / BIT


normal = sg.GaussianMixture(sde, [1.0], torch.zeros(1, 1, dtype=torch.float64), 1.0)
laws = {"normal": normal, "two peaks": peaks(2), "four peaks": peaks(4)}
stds = torch.logspace(-2, 0.3, 40, dtype=torch.float64)
asked = [0.02, 0.1, 0.4, 1.6]
points = {}
for name, law in laws.items():
    x, points[name] = law.sample(400, torch.Generator().manual_seed(0)), []
    for std in asked:
        rate = latent.bound(of_one(law, std), x, draws=4).rate.mean()
        value, error = float(rate.value) / BIT, float(rate.standard_error) / BIT
        exact = information(law, std)
        points[name].append(value)
        print(f"{name:10} noise {std:4}: {value:.3f} ± {error:.3f} bits, exact {exact:.3f}")
        assert abs(value - exact) < 4 * error + 0.01
assert abs(information(normal, 0.1) - 0.5 * math.log2(101)) < 1e-3
assert abs(information(peaks(2), 0.25) - 1) < 0.01
assert abs(information(peaks(4), 0.15) - 2) < 0.03

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(7.5, 3.6), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, law), colour in zip(laws.items(), (BLUE, RED, GREEN), strict=True):
    ax.semilogx(stds, [information(law, float(s)) for s in stds], color=colour, lw=2, label=name)
    ax.plot(asked, points[name], "o", color=colour)
ax.set(xlabel=r"noise $\sigma$ of the latent", ylabel="bits", ylim=(0, 6))
ax.legend(frameon=False, title="law of the latents")
figure

# %% [markdown]
# Points are the bound of the diffusion model, lines are exact. A latent with two peaks is one bit,
# whatever the noise, until the noise is finer than the peaks; with four it is two bits. The
# normal law holds the most for its variance, half a bit more each time that the noise is divided
# by $\sqrt2$.
#
# So there is no KL weight to choose. Choose the noise; at $\sigma=0.08$ of the deviation of
# the latents, a log signal-to-noise ratio of 5, a latent holds at most 3.6 bits.
#
# ## Who has the wrong prior pays
#
# A plain VAE takes $\mathcal N(0,I)$ for the law of its latents. The mean cost is then larger by
# $\mathrm{KL}$ of the law that they have to $\mathcal N(0,1)$, which is what a diffusion prior
# saves. Here is the cost under the true law, and under the normal law of the same variance:

# %%
four = laws["four peaks"]
x = four.sample(2000, torch.Generator().manual_seed(1))
rows = {}
for std in asked:
    right = latent.bound(of_one(four, std), x).rate.mean()
    wrong = latent.bound(of_one(normal, std), x).rate.mean()
    saved = 0.5 * math.log2(1 + 1 / std**2) - information(four, std)  # = KL(law, normal)
    rows[std] = (float(right.value) / BIT, float(wrong.value) / BIT, saved)
    error = math.hypot(float(right.standard_error), float(wrong.standard_error)) / BIT
    print(f"noise {std:4}: {rows[std][1]:.3f} - {rows[std][0]:.3f} bits, KL {saved:.3f}")
    assert abs(rows[std][1] - rows[std][0] - saved) < 4 * error + 0.01

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(6.5, 3.0), layout="constrained", dpi=120)
ax = figure.subplots()
place = torch.arange(len(asked))
ax.bar(place - 0.2, [r[1] for r in rows.values()], 0.38, color=BLUE, label="normal prior")
ax.bar(place + 0.2, [r[0] for r in rows.values()], 0.38, color=GREEN, label="diffusion prior")
ax.set_xticks(place, [f"{s:g}" for s in asked])
ax.set(xlabel=r"noise $\sigma$", ylabel="bits", title="cost of a latent with four peaks")
ax.legend(frameon=False)
figure

# %% [markdown]
# ## Rate and distortion
#
# The decoder pays the rest: $-\log p(x)\le\text{rate}+\text{distortion}$, distortion
# $=\mathrm E_q[-\log p(x\mid z)]$. Both are bits of one message. Take $x=wz+r\epsilon$ with
# $z\sim\mathcal N(0,1)$, probabilistic PCA, where $p(x)$ is known, and an encoder with the right
# mean and *any* deviation:

# %%
w, r = 1.5, 0.4
v = w**2 + r**2
best = r / math.sqrt(v)  # deviation of the posterior of z
x = math.sqrt(v) * torch.randn(
    4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64
)
truth = float((0.5 * (x**2 / v + math.log(2 * math.pi * v))).mean()) / BIT


def cost(std):
    """Rate and distortion in bits."""
    pair = Pair(lambda x: x * w / v, lambda z: w * z, (1,), (1,), std=std).double()
    pair.log_std.data.fill_(math.log(r))
    with torch.no_grad():
        found = pair.cost(x, torch.Generator().manual_seed(3)).mean()
    return float(found.rate) / BIT, float(found.distortion) / BIT


noise = torch.logspace(-1.6, 0, 17, dtype=torch.float64)
rate, distortion = torch.tensor([cost(float(s)) for s in noise]).T
ours = cost(best)
print(
    f"at the deviation of the posterior, {best:.3f}: {ours[0]:.3f} + {ours[1]:.3f} ="
    f" {sum(ours):.3f} bits; -log p(x): {truth:.3f}"
)
assert abs(sum(ours) - truth) < 0.05
assert (rate.diff() < 0).all()
assert (distortion.diff() > 0).all()

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10, 3.3), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
left.semilogx(noise, rate, color=BLUE, lw=2, label="rate")
left.semilogx(noise, distortion, color=RED, lw=2, label="distortion")
left.semilogx(noise, rate + distortion, color="black", lw=2, label="sum")
left.axhline(truth, color=plots.QUIET, ls=":", label=r"$-\log_2 p(x)$")
left.axvline(best, color=plots.QUIET, lw=0.8)
left.set(xlabel="deviation of the encoder", ylabel="bits", ylim=(0, 6))
left.legend(frameon=False)
right.plot(rate, distortion, color="black", lw=2)
right.plot(*ours, "o", color=GREEN, label="posterior")
right.plot(rate, truth - rate, ":", color=plots.QUIET, label="sum is $-\\log_2p(x)$")
right.set(xlabel="rate, bits", ylabel="distortion, bits", ylim=(0, 4))
right.legend(frameon=False)
figure

# %% [markdown]
# Less noise, more rate, less distortion. The sum is least at the posterior, where it *is*
# $-\log p(x)$: everywhere else it is more by the KL of encoder and posterior. A weight on
# the KL moves along the curve, and what it makes small is no bound.
#
# ## Digits
#
# Sixteen latents of noise 0.1 for the $8\times8$ pixels of 17 levels. The distortion is minus the
# logarithm of probabilities of levels that sum to 1.

# %%
model = load("checkpoints/unified", kind=LatentModel)
train, test = data.digits("train"), data.digits("test")
found = latent.bound(model.given(y=test.y), test.x, draws=8).bits_per_dim.mean()
with torch.no_grad():
    plain = model.autoencoder.cost(test.x, sg.Streams(0)).bits_per_dim.mean()
levels, seen = (quantise(part.x, 17).flatten(1) for part in (train, test))
counts = torch.nn.functional.one_hot(levels, 17).double().sum(0) + 1 / 17
pixels = -(counts / (len(levels) + 1)).log2().gather(1, seen.T).mean()
print(
    f"diffusion prior: rate {float(found.rate.value):.3f} + distortion"
    f" {float(found.distortion.value):.3f} = {float(found.total.value):.3f} bits a pixel"
)
print(f"normal prior:    rate {float(plain.rate):.3f}, sum {float(plain.total):.3f}")
print(f"independent pixels {float(pixels):.3f}; all levels alike {math.log2(17):.3f}")
print(
    f"a latent holds {64 * float(found.rate.value) / 16:.2f} bits, at most"
    f" {0.5 * math.log2(1 + 1 / model.level):.2f}"
)
assert found.total.value < pixels
assert found.rate.value < plain.rate
assert found.rate.value * 64 / 16 < 0.5 * math.log2(1 + 1 / model.level)

# %% [markdown]
# ## The first bits and the last
#
# The rate is an integral over the noise, from much to little: the first bits are those that are
# still seen through much noise. Send only the part above a level $w$, and let the receiver draw
# the rest from the model: with few bits there comes some digit, with more the right one, with all
# of them its strokes. (Bits are counted beyond the class, which the score is told; what is drawn
# is drawn without it.)

# %%
score = model.score
with torch.no_grad():
    c, v = model.posterior(test.x)  # v: latents of less deviation have more noise for theirs
grid = torch.logspace(math.log10(model.level), 4, 60, dtype=torch.float64)
g = torch.Generator().manual_seed(4)
lost = []
for level in grid:
    t = sde.time_at(-torch.log(level)).clamp(model.end, sde.T)
    e = torch.randn(c.shape, generator=g)
    y = float(sde.alpha(t)) * (c + (v + float(level)).sqrt() * e)
    wanted = c + v / (v + float(level)).sqrt() * e  # E[latent | y, x]
    with torch.no_grad():
        denoised = score.given(y=test.y).evaluate(y, t).denoised
    lost.append(float((wanted - denoised).double().square().sum(1).mean()))
lost = torch.tensor(lost, dtype=torch.float64) / (2 * grid) / BIT  # bits for each e-fold of w
steps = grid.log().diff() * (lost[1:] + lost[:-1]) / 2
above = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
bound = 64 * float(found.rate.value)
print(f"bits of an image, by this sum {above[0]:.1f}, by the bound {bound:.1f}")
assert abs(above[0] - bound) < 0.1 * bound

shares = (0.05, 0.2, 0.5, 0.8)
few = torch.stack([torch.nonzero(test.y == k)[0, 0] for k in range(10)])
rows, names, distances = [test.x[few]], ["test images"], []
for kept in shares:
    i = max(1, int((above - kept * above[0]).abs().argmin()))
    drawn = redraw(model, test.x[:200], math.sqrt(float(grid[i])), seed=5, eta=1.0)
    distances.append(float((drawn - test.x[:200]).flatten(1).norm(dim=1).mean()))
    rows.append(redraw(model, test.x[few], math.sqrt(float(grid[i])), seed=5, eta=1.0))
    names.append(f"{float(above[i]):.0f} bits")
names.append(f"all {float(above[0]):.0f} bits")
rows.append(model.facts.units.decode(model.facts.units.encode(test.x[few])))
print("distance to the test image:", [f"{d:.2f}" for d in distances])
assert all(a > b for a, b in itertools.pairwise(distances))

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
plots.image_grid(torch.cat(rows), len(rows), names, "the rest drawn anew", left)
right.semilogx(grid.sqrt(), lost, color=BLUE, lw=2)
right.fill_between(grid.sqrt(), lost, color=BLUE, alpha=0.15)
right.set(xlabel=r"noise $\sqrt{w}$ on the latents", ylim=(0, None), xlim=(None, 30))
right.set(title="bits of an image for each factor e of w")
figure

# %% [markdown]
# ## Exercises
#
# **1.** *The scale factor.* Someone's autoencoder has latents ten times as large as yours, its
# noise too. Another multiplies the latents alone. What happens to the rate, in each case?


# %%
def of_scaled(factor, std):
    """Latents factor * x + std e of normal data, and their true prior."""
    pair = Pair(lambda x: factor * x, lambda z: z / factor, (1,), (1,), std=std).double()
    facts = sg.Facts.of(factor * normal.sample(4000, torch.Generator().manual_seed(6)), "all")
    return LatentModel(pair, sg.Gaussian(sde, torch.zeros(1).double(), 1.0).with_facts(facts))


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
x = normal.sample(1000, torch.Generator().manual_seed(7))
bits = {
    name: float(latent.bound(of_scaled(*pair), x).rate.mean().value) / BIT
    for name, pair in {"yours": (1, 0.1), "both": (10, 1.0), "latents alone": (10, 0.1)}.items()
}
print({name: f"{b:.2f} bits" for name, b in bits.items()})
print("Only noise over deviation counts: a factor of 10 is log2(10) = 3.32 bits, or none.")
assert abs(bits["both"] - bits["yours"]) < 0.02
assert abs(bits["latents alone"] - bits["yours"] - math.log2(10)) < 0.1

# %% [markdown]
# **2.** *Fewer than no bits.* A report says: "our autoencoder reaches $-1.3$ bits a pixel". Its
# decoder is a normal density with a learned deviation, the images have pixels that are always
# black. What was reported? Compute the "bits" of a constant pixel for deviations 0.1, 0.01, 0.001,
# and what a distribution over 256 levels would say.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
cell = 2 / 256
for std in (0.1, 0.01, 0.001):
    density = math.log2(std * math.sqrt(2 * math.pi))  # -log2 of the density at its mean
    cells = density - math.log2(cell)  # taken for constant on a cell
    inside = math.erf(cell / 2 / (std * math.sqrt(2)))  # probability of the cell
    print(
        f"deviation {std}: density {density:6.2f}, density times cell {cells:6.2f},"
        f" probability {-math.log2(inside):.2f} bits"
    )
print("A density has no bits: it falls without end. Probabilities of levels do not go below 0.")
assert cells < 0 <= -math.log2(inside)

# %% [markdown]
# **3.** *A weight on the KL.* With a weight $\beta$ the encoder of the PCA above makes
# distortion $+\beta\,$rate small. Which deviation does it choose for $\beta=\frac14$ and $4$, and
# how far from $-\log p(x)$ is rate + distortion there?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
for beta in (0.25, 1.0, 4.0):
    i = int((distortion + beta * rate).argmin())
    exact = math.sqrt(beta / (beta + w**2 / r**2))  # of the mean that is held, d/ds = 0
    gap = float(rate[i] + distortion[i]) - truth
    print(f"beta {beta}: deviation {float(noise[i]):.3f} (exact {exact:.3f}), {gap:.3f} bits over")
    assert abs(math.log(float(noise[i]) / exact)) < 0.2
print("It is one place on the curve, chosen by hand. The bound is tight at beta = 1 alone.")

# %% [markdown]
# ## What to remember
#
# - Noise makes a number finite: a latent holds at most $\frac12\log_2(1+1/\sigma^2)$ bits.
# - What it costs is set by the prior. A normal prior pays the KL of the law that latents have to
#   it; a diffusion prior saves that.
# - Rate and distortion are parts of one bound, in one unit, and need no weight.
# - Distortion is bits if the decoder gives probabilities of levels; a density gives none.
