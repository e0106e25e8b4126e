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
# # 4. The score from data
#
# **Nobody knows the density of images. How does one learn its score, and why must one not learn
# it exactly?**
#
# [Notebook 3](03_reversal.ipynb) needed one thing: the score. Here it comes from data, in two
# ways. One is exact and useless, the other is approximate and works.
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
import torch
from matplotlib.figure import Figure

import sde_gen as sg
from sde_gen import data, metrics, plots
from sde_gen.networks import MLP

sde = sg.VP()
points = data.two_moons(300, torch.Generator().manual_seed(0))
fresh = data.two_moons(4000, torch.Generator().manual_seed(1))

# %% [markdown]
# ## The exact score of a data set
#
# A data set is a law: equal mass on each of its $N$ points. Noised, it is a mixture of $N$
# Gaussians, and its score is known: with $r_i(x)$ the probability that $x$ came from point $x_i$,
#
# $$s(x,t)=\frac{\alpha_t\sum_i r_i(x)\,x_i-x}{\sigma_t^2}.$$
#
# No network, no training. Let us sample it.

# %%
empirical = sg.Empirical(sde, points)
copies = sg.sample(empirical, 1000, steps=40, seed=0, solver=sg.Exponential(3))
distance = metrics.nearest_neighbour_distance(copies, points)
print(f"distance to the nearest data point: median {distance.median():.1e}")
assert float(distance.median()) < 1e-4

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2, sharey=True)
left.scatter(*points.T, s=5, color=plots.COLOURS[0])
right.scatter(*points.T, s=26, facecolor="none", edgecolor=plots.QUIET, lw=0.6, label="data")
right.scatter(*copies.T, s=5, color=plots.COLOURS[1], label="samples")
left.set(title="300 data points", aspect="equal")
right.set(title="1000 samples of their exact score", aspect="equal")
right.legend(frameon=False)
figure

# %% [markdown]
# Every sample is a copy. Of course: the exact score of the data leads back to the data. **A
# generative model that fits its score perfectly generates nothing new.** What we want is the
# score of the law *behind* the data, and the data do not determine it; whatever is new in a
# sample comes from how the model fails to fit.
#
# ## Denoising score matching
#
# The exact score is a conditional mean, $s(x,t)=\mathrm E[-z/\sigma_t\mid x_t=x]$ with
# $x_t=\alpha_tx_0+\sigma_tz$. Conditional means are what least squares finds. So draw a point, a
# time and a noise, and regress:
#
# $$\mathrm E\;\|\sigma_t\,s_\theta(x_t,t)+z\|^2\;\to\;\min .$$
#
# The minimum is not zero: nobody can tell from $x_t$ which $z$ was drawn. For Gaussian data
# $N(0,c^2)$ what remains is exactly $\alpha^2c^2/(\alpha^2c^2+\sigma^2)$: near 1 at small noise
# (hopeless), near 0 at large noise (trivial).

# %%
c, n = 0.5, 200_000
gaussian = sg.Gaussian(sde, torch.zeros(1), c)
x = gaussian.sample(n, torch.Generator().manual_seed(0))
for t in (0.05, 0.3, 0.8):
    loss = sg.dsm_loss(
        gaussian, sde, x, torch.full((n,), t), noise=torch.Generator().manual_seed(1)
    )
    a, s = sde.alpha(t), sde.sigma(t)
    exact = float((a * c) ** 2 / ((a * c) ** 2 + s**2))
    print(f"t = {t}: loss of the exact score {loss.mean():.4f}, formula {exact:.4f}")
    assert abs(float(loss.mean()) - exact) < 5 * float(loss.std()) / n**0.5

# %% [markdown]
# ## What a network learns
#
# The same 300 points, a small network, a few seconds. (`EMA`: `train` returns the average of the
# weights over the run.)

# %%
torch.manual_seed(0)
model = sg.ScoreNetwork(MLP((2,), width=96, depth=2), sde, facts=sg.Facts.of(points))
model = sg.train(model, points, recipe=sg.Recipe(steps=1200, batch=256), progress=False)
new = sg.sample(model, 4000, steps=25, seed=0)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2, sharey=True)
left.scatter(*fresh.T, s=2, color=plots.COLOURS[0], alpha=0.4, lw=0)
right.scatter(*new.T, s=2, color=plots.COLOURS[1], alpha=0.4, lw=0)
left.set(
    title="the law behind the data (4000 points)", aspect="equal", xlim=(-2, 2), ylim=(-1.6, 1.6)
)
right.set(title="4000 samples of the network", aspect="equal", xlim=(-2, 2))
figure

# %% [markdown]
# Compare three clouds with the law: the data themselves, the copies, and the network's points.
# And ask how far samples lie from the 300 points: copies at distance 0, the network's like
# *fresh* points of the law.

# %%
near = metrics.nearest_neighbour_distance
for name, cloud in (("copies", copies), ("network", new), ("fresh points", fresh)):
    d = near(cloud, points)
    print(f"{name:13} distance to the 300 data points: median {d.median():.3f}")
ratio = float(near(new, points).median() / near(fresh, points).median())
energy = {k: metrics.energy_distance(v, fresh) for k, v in (("copies", copies), ("network", new))}
print(
    f"energy distance to the law: copies {energy['copies']:.4f}, network {energy['network']:.4f}"
)
assert 0.5 < ratio < 2.0
assert energy["network"] < 0.02

# %% [markdown]
# The two scores agree where noise is large, where everybody sees the same blob, and part where it
# becomes smaller than the distance between the points. There the exact score singles out one
# point; the network, which is smooth, keeps the moons. That is where novelty comes from.

# %%
gap = {}
for t in (0.35, 0.02):
    x_t = sde.perturb(fresh, torch.tensor(t), torch.Generator().manual_seed(2)).x
    with torch.no_grad():
        exact, learned = empirical(x_t, t), model(x_t, t)
    gap[t] = float((learned - exact).square().sum() / exact.square().sum())
print("relative difference of the two scores:", {t: round(g, 3) for t, g in gap.items()})
assert gap[0.35] < 0.1 < gap[0.02]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(10, 7.2), layout="constrained", dpi=110)
for row, t in zip(figure.subplots(2, 2), gap, strict=True):
    for ax, score, name in zip(
        row, (empirical, model), ("exact score of the data", "network"), strict=True
    ):
        plots.score_field(
            lambda x, t=t, f=score: f(x, t),
            (-1.8, 1.8, -1.3, 1.3),
            arrows=24,
            title=f"{name}, t = {t}, noise {float(sde.sigma(t)):.2f}",
            ax=ax,
        )
        ax.scatter(*points.T, s=2, color="black", zorder=3)
figure

# %% [markdown]
# ## Tweedie: a score is a denoiser
#
# $$D(x,t)=\mathrm E[x_0\mid x_t=x]=\frac{x+\sigma_t^2\,s(x,t)}{\alpha_t}.$$
#
# On digits, with the exact score of all training images: a little noise is removed; with much
# noise the answer is an average over all images that could be meant, which is why denoisers blur.
# It is the best answer in mean square, and it is not a digit.

# %%
digits, labels = data.digits("train")
scores = sg.Empirical(sde, digits)
clean = data.digits("test").x[3:13]
rows, noise_levels = [clean], (0.1, 0.2, 0.4)
for t in noise_levels:
    x_t = sde.perturb(clean, torch.tensor(t), torch.Generator().manual_seed(4)).x
    rows += [x_t, scores.denoise(x_t, t)]
names = ["unseen digits"] + [
    f"{k} at t = {t}" for t in noise_levels for k in ("noised", "denoised")
]
average = float((scores.denoise(sde.prior(20, 1, 8, 8), 1.0) - digits.mean(0)).abs().mean())
print(f"at t = 1 the denoiser answers with the mean of all data, up to {average:.3f}")
assert average < 0.03
plots.image_grid(torch.cat(rows), rows=7, labels=names)

# %% [markdown]
# ## Five names for one thing
#
# A network may predict the noise $z$, the data $x_0$, the velocity $v=\alpha z-\sigma x_0$, the
# flow $u=z-x_0$ of flow matching or Karras' preconditioned residual: each is the score up to a
# known linear map. Exactly the same loss, exactly the same optimum, but not the same *errors*: if
# the output is wrong by $\epsilon$, the denoised state is wrong by a factor that depends on the
# noise.

# %%
t = sde.time_at(torch.linspace(9, -9, 200))
alpha, sigma = sde.alpha(t), sde.sigma(t)
v = (alpha * 0.5) ** 2 + sigma**2
factors = {
    "noise": sigma / alpha,
    "data": torch.ones_like(t),
    "velocity": sigma / (alpha**2 + sigma**2),
    "flow": sigma / (alpha + sigma),
    "preconditioned": 0.5 * sigma / v.sqrt(),
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, factor), colour in zip(factors.items(), plots.COLOURS, strict=False):
    ax.loglog(sigma / alpha, factor, label=name, color=colour, lw=2)
ax.axhline(0.5, color=plots.QUIET, ls=":", lw=1)
ax.text(0.012, 0.56, "spread of the data", color=plots.QUIET, fontsize="small")
ax.set(
    xlabel=r"noise to signal $\sigma/\alpha$", ylabel="error of $D$ for an error 1 of the output"
)
ax.legend(frameon=False)
figure

# %% [markdown]
# "noise" multiplies errors without bound at large noise; "data" gives no help at small noise,
# where the answer is known almost exactly. The others are small at small noise *and* bounded at
# large noise. `"preconditioned"` is the default. Flow matching is thereby no other method: its $u$
# is the mean of $\mathrm{d}x_t/\mathrm{d}t$ on the straight path $x_t=(1-t)\,x_0+t\,z$
# (`sg.RectifiedFlow()`), and a network of it serves every process at the same ratio of noise to
# signal. One check that the five really are one score: the same ideal denoiser, read in each way.


# %%
class Ideal(torch.nn.Module):
    """Gives each parametrisation the output that the exact score of the moons implies."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x, c):
        ratio = torch.exp(4 * c)  # sigma / alpha
        t = sde.time_at(-2 * torch.log(ratio))
        a, s = (k.to(x).reshape(-1, 1) for k in (sde.alpha(t), sde.sigma(t)))
        x = x * torch.sqrt((a * 0.5) ** 2 + s**2)
        denoised = empirical.denoise(x, t)
        noise, norm = (x - a * denoised) / s, torch.sqrt((a * 0.5) ** 2 + s**2)
        return {
            "noise": noise,
            "data": denoised,
            "velocity": a * noise - s * denoised,
            "flow": noise - denoised,
            "preconditioned": (denoised - a * 0.25 / norm**2 * x) * norm / (s * 0.5),
        }[self.target]


x, t = fresh[:64].double(), torch.full((64,), 0.3, dtype=torch.float64)
for name in factors:
    score = sg.ScoreNetwork(Ideal(name), sde, name, facts=sg.Facts(std=0.5))
    error = float((score(x, t) - empirical(x, t)).abs().max())
    print(f"{name:15} differs from the exact score by {error:.1e}")
    assert error < 1e-6

# %% [markdown]
# ## Exercises
#
# **1.** Sample the exact score of the data with kernel width 0.1 in place of 0
# (`GaussianMixture(sde, ones, points, 0.1)`). Is this a generative model? Is it better than the
# network?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
kernel = sg.GaussianMixture(sde, torch.ones(len(points)), points.double(), 0.1)
blurred = sg.sample(kernel, 4000, steps=25, seed=0)
fit = metrics.energy_distance(blurred, fresh)
print(f"energy distance: kernel {fit:.4f}, network {energy['network']:.4f}")
print("It is: a kernel density estimate. In the plane it is about as good.")
assert float(near(blurred, points).median()) > 0.02
assert fit < 0.03

# %% [markdown]
# **2.** Train on 10 points only, longer. Does the network memorise? Compare the distances.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
torch.manual_seed(0)
few = points[:10]
small = sg.ScoreNetwork(MLP((2,), width=96, depth=2), sde, facts=sg.Facts.of(few))
small = sg.train(small, few, recipe=sg.Recipe(steps=1500, batch=256), progress=False)
remembered = near(sg.sample(small, 1000, steps=40, seed=0), few)
print(f"median distance to the 10 points {remembered.median():.3f}")
print(f"the same of fresh points         {near(fresh, few).median():.3f}")
assert float(remembered.median()) < 0.5 * float(near(fresh, few).median())

# %% [markdown]
# **3.** Show that the loss of denoising score matching and the true squared error of the score
# differ by a constant: compare two wrong scores, $0.8\,s$ and $1.1\,s$, for the Gaussian above at
# $t=0.3$.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
x, t = gaussian.sample(n, torch.Generator().manual_seed(0)), torch.full((n,), 0.3)
x_t = sde.perturb(x, t, torch.Generator().manual_seed(1)).x
s, sigma = gaussian(x_t, t), float(sde.sigma(0.3))
gaps = []
for k in (0.8, 1.0, 1.1):
    loss = sg.dsm_loss(k * gaussian, sde, x, t, noise=torch.Generator().manual_seed(1)).mean()
    true = ((k - 1) * sigma * s).square().mean()
    gaps.append(float(loss - true))
    print(f"{k} s: loss {loss:.4f} - squared error {true:.4f} = {gaps[-1]:.4f}")
assert max(gaps) - min(gaps) < 0.005

# %% [markdown]
# ## What to remember
#
# - Least squares finds conditional means, and the score is one: that is all of denoising score
#   matching.
# - The exact score of the data copies them. New samples come from the network's smoothness.
# - Noise, data, velocity, flow: one score. They differ in which errors they forgive.
