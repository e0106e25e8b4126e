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
# # 6. Guidance
#
# **Add a gradient to the score: which law do you sample then?**
#
# Text-to-image models live by guidance: extrapolate from the unconditional score through the
# conditional one, and pictures get sharper. The formula looks like Bayes' rule. We shall see
# where it is Bayes' rule, and, in closed form, what it is elsewhere: not the law that the formula
# suggests.
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

import torch
from matplotlib.figure import Figure

import sde_gen as sg
from sde_gen import plots
from sde_gen.networks import MLP
from sde_gen.training import Classification

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Where it is exact
#
# Three classes in the plane; the class is the component of a mixture. Bayes' rule holds at every
# noise level:
#
# $$\nabla\log p_t(x\mid c)=\nabla\log p_t(x)+\nabla\log p_t(c\mid x).$$
#
# So the unconditional score plus the gradient of a classifier *of noisy data* is the conditional
# score: not almost, but exactly.

# %%
sde = sg.EDM(80.0)
angle = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
means = torch.stack([angle.cos(), angle.sin()], 1)
stds = torch.tensor([0.45, 0.35, 0.35])
law = sg.GaussianMixture(sde, torch.ones(3), means, stds)
classes = [sg.Gaussian(sde, m, float(s)) for m, s in zip(means, stds, strict=True)]


class Posterior(sg.Score):
    """grad log p_t(c | x) of the exact classifier of noisy data."""

    def __init__(self, c):
        self.c, self.sde, self.facts = c, sde, law.facts.of_another_law()

    def __call__(self, x, t):
        return torch.func.grad(lambda x: law.posterior(x, t)[:, self.c].log().sum())(x)


x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
for t in (0.1, 0.5, 2.0):
    error = float(((law + Posterior(0))(x, t) - classes[0](x, t)).abs().max())
    print(f"t = {t}: unconditional + classifier differs from the conditional score by {error:.0e}")
    assert error < 1e-8

# %% [markdown]
# ## More than exact
#
# Now scale: $s+(1+\gamma)\nabla\log p_t(c\mid x)$, which is the same as
# $(1+\gamma)\,s_c-\gamma\,s$, the form of classifier-free guidance. At $t=0$ this is the score of
# the product $p(x)\,p(c\mid x)^{1+\gamma}$, "the class, but more so". Let us look.

# %%
cloud = law.sample(3000, torch.Generator().manual_seed(1))
drawn, spread, centre = {}, {}, {}
for gamma in (0.0, 1.0, 3.0, 8.0):
    guided = (1 + gamma) * classes[0] - gamma * law
    drawn[gamma] = y = sg.sample(guided, 1500, steps=60, seed=0, dtype=torch.float64)
    spread[gamma], centre[gamma] = float(y.std(0).mean()), float(y[:, 1].mean())
print({g: f"centre {centre[g]:.2f}, spread {spread[g]:.2f}" for g in spread})
assert centre[0.0] < centre[1.0] < centre[3.0] < centre[8.0]
assert abs(centre[0.0] - 1) < 0.05
assert abs(spread[0.0] - 0.45) < 0.02

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 3.5), layout="constrained", dpi=120)
for ax, (gamma, y) in zip(figure.subplots(1, 4, sharey=True), drawn.items(), strict=True):
    ax.scatter(*cloud.T, s=2, color=plots.QUIET, alpha=0.25, lw=0)
    ax.scatter(*y.T, s=3, color=plots.COLOURS[1], alpha=0.5, lw=0)
    ax.set(title=f"$\\gamma$ = {gamma:g}", aspect="equal", xlim=(-2.2, 2.2), ylim=(-1.8, 3.4))
figure

# %% [markdown]
# The cloud moves away from the *other classes*, past the centre of its own (which is at height
# 1), to where hardly any data are. Typical becomes exaggerated: the saturated colours of strongly
# guided images.
#
# ## Which law is it?
#
# On the line everything can be computed. Class $N(\mu,v_c)$ with $\mu=1$, $v_c=0.3$; all data
# $N(0,v_u)$ with $v_u=1$; $\gamma=1.5$. The product $p_c^{1+\gamma}/p_u^{\gamma}$ is a Gaussian.
# And the flow of the guided score is linear: in the noise variance $w=t^2$,
#
# $$\frac{\mathrm dx}{\mathrm dw}=
#   \frac12\left[(1+\gamma)\frac{x-\mu}{v_c+w}-\gamma\frac{x}{v_u+w}\right],$$
#
# so its gain from $w_T$ to 0 is
# $\left(\frac{v_c}{v_c+w_T}\right)^{(1+\gamma)/2}\left(\frac{v_u}{v_u+w_T}\right)^{-\gamma/2}$.

# %%
mu, v_c, v_u, gamma = 1.0, 0.3, 1.0, 1.5
line = sg.EDM(80.0)
given = sg.Gaussian(line, torch.tensor([mu]), math.sqrt(v_c))
free = sg.Gaussian(line, torch.tensor([0.0]), math.sqrt(v_u))
guided = (1 + gamma) * given - gamma * free

precision = (1 + gamma) / v_c - gamma / v_u
product = ((1 + gamma) * mu / v_c / precision, 1 / precision)

w_T = 80.0**2
gain = (v_c / (v_c + w_T)) ** ((1 + gamma) / 2) * (v_u / (v_u + w_T)) ** (-gamma / 2)
log_w = torch.linspace(math.log(1e-8), math.log(w_T), 200_001)
w = log_w.exp()
partial = (v_c / (v_c + w)) ** ((1 + gamma) / 2) * (v_u / (v_u + w)) ** (-gamma / 2)
push = 0.5 * (1 + gamma) * mu / (v_c + w) * partial * w
flow_law = (float(torch.trapezoid(push, log_w)), gain**2 * w_T)

start = line.prior(20_000, 1, generator=torch.Generator().manual_seed(0))
grid = sg.grids.log_snr(line, 60, end=1e-3)
x = sg.solve(line.probability_flow(guided), start, grid, sg.Exponential(3))
print(f"the class      mean {mu:.3f}  variance {v_c:.3f}")
print(f"the product    mean {product[0]:.3f}  variance {product[1]:.3f}")
print(f"guided, exact  mean {flow_law[0]:.3f}  variance {flow_law[1]:.3f}")
print(f"guided, drawn  mean {x.mean():.3f}  variance {x.var():.3f}")
assert abs(float(x.mean()) - flow_law[0]) < 0.01
assert abs(float(x.var()) - flow_law[1]) < 0.003
assert abs(product[0] - 1.22) < 0.005
assert abs(flow_law[0] - 1.53) < 0.01

# %% [markdown]
# **Neither.** The guided flow overshoots the product in the mean, and is three times narrower.
# Guidance at large noise has pushed where the product, which is defined at $t=0$, knows nothing
# of it: noising and multiplying do not commute, so the guided score is the score of no noised
# law.

# %%
axis = torch.linspace(-1.5, 3.2, 600)


def density(mean, variance):
    return torch.exp(-0.5 * (axis - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)


# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=120)
ax = figure.subplots()
curves = {
    "all data": (0, v_u),
    "the class": (mu, v_c),
    "the product": product,
    "what the flow draws": flow_law,
}
for (name, (m, v)), colour in zip(curves.items(), (plots.QUIET, *plots.COLOURS), strict=False):
    ax.plot(axis, density(m, v), label=name, color=colour, lw=2)
ax.hist(x[:, 0], 80, density=True, color=plots.COLOURS[2], alpha=0.3)
ax.legend(frameon=False)
ax.set(title="guidance on the line, $\\gamma$ = 1.5", xlabel="$x$", yticks=[])
figure

# %% [markdown]
# ## Now $\eta$ matters
#
# For a true score every $\eta$ gives the same law ([notebook 3](03_reversal.ipynb)). The guided
# score is none, so each $\eta$ draws a law of its own.

# %%
fine = sg.grids.log_snr(line, 800, end=1e-3)
by_eta = {}
for eta in (0.0, 0.5, 1.0, 2.0):
    y = sg.solve(line.reverse(guided, eta), start[:8000], fine, sg.Exponential(2), 1)
    by_eta[eta] = (float(y.mean()), float(y.var()))
    print(f"eta = {eta:3}: mean {by_eta[eta][0]:.3f}  variance {by_eta[eta][1]:.3f}")
assert by_eta[0.0][0] - by_eta[2.0][0] > 0.1
assert by_eta[2.0][1] > 1.5 * by_eta[0.0][1]

# %% [markdown]
# More noise comes closer to the product: with $\eta\to\infty$ the process is Langevin dynamics at
# each level, which forgets where it came from, and at $t=0$ the guided score *is* the score of
# the product. So if you want the product, finish with Langevin steps at $t\approx0$:

# %%
still = sg.langevin(guided, x[:4000], steps=400, h=0.01, at=1e-3, noise=2, thin=400)
end = still.samples[-1]
ula = product[1] / (1 - 0.01 / (2 * product[1]))  # the variance that steps of 0.01 settle at
print(f"after Langevin: mean {end.mean():.3f}, variance {end.var():.3f}")
print(f"the product     mean {product[0]:.3f}, variance {product[1]:.3f}, by ULA {ula:.3f}")
assert abs(float(end.mean()) - product[0]) < 0.03
assert abs(float(end.var()) - ula) < 0.015

# %% [markdown]
# ## A classifier that is learned
#
# On the three classes: train a small network to tell them apart *at every noise level*, and add
# its gradient. At $\gamma=0$ this should be the class itself.

# %%
torch.set_default_dtype(torch.float32)
torch.manual_seed(0)
points = law.sample(6000, torch.Generator().manual_seed(3)).float()
labels = law.posterior(points.double()).multinomial(1, generator=torch.Generator().manual_seed(4))[
    :, 0
]
net = MLP((2,), width=64, depth=1, outputs=3)
net = sg.train(
    net,
    points,
    labels,
    sg.Recipe(steps=1600),
    objective=Classification(sde, law.facts),
    progress=False,
)
one = sg.sample(law + sg.Classifier(net, 0, sde, law.facts), 2000, steps=40, seed=0)
print("mean  ", [f"{m:.3f}" for m in one.mean(0).tolist()], "exact 0, 1")
print("spread", [f"{s:.3f}" for s in one.std(0).tolist()], "exact 0.45")
assert float((one.mean(0) - means[0]).abs().max()) < 0.06
assert float((one.std(0) - 0.45).abs().max()) < 0.06

# %% [markdown]
# ## Guidance only in between
#
# If large noise is where guidance does the harm, leave it out there. A weight may be a function
# of time: here guidance acts only while the noise is below 1.


# %%
class Labelled(sg.Score):
    """The score of a class, or of all data where the label is -1: what ClassifierFree reads."""

    sde, facts = sde, law.facts

    def __call__(self, x, t, y):
        each = torch.stack([*(c(x, t) for c in classes), law(x, t)])
        return each[torch.where(y < 0, 3, y), torch.arange(len(x))]


def interval(t):
    return torch.where((t > 0.05) & (t < 1.0), 3.0, 0.0)


figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
heights = {}
for ax, (name, weight) in zip(
    figure.subplots(1, 2, sharey=True),
    {"always": 3.0, "only while noise < 1": interval}.items(),
    strict=True,
):
    y = sg.sample(sg.ClassifierFree(Labelled(), weight, y=0), 1500, steps=60, seed=0)
    heights[name] = float(y[:, 1].mean())
    ax.scatter(*cloud.T, s=2, color=plots.QUIET, alpha=0.25, lw=0)
    ax.scatter(*y.T, s=3, color=plots.COLOURS[1], alpha=0.5, lw=0)
    ax.set(
        title=f"{name}: mean height {heights[name]:.2f}",
        aspect="equal",
        xlim=(-2.2, 2.2),
        ylim=(-1.8, 3),
    )
assert 1.0 < heights["only while noise < 1"] < heights["always"]
figure

# %% [markdown]
# ## Exercises
#
# **1.** Tempering: to sample $p^a$ one is tempted to multiply the score by $a$. For data $N(0,v)$
# and large $\sigma_T$ show that the reverse-time SDE ($\eta=1$) then gives variance $v/(2a-1)$,
# not $v/a$.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
a, v = 2.0, 0.5
normal = sg.Gaussian(line, torch.zeros(1), math.sqrt(v))
hot = a * normal
y = sg.solve(
    line.reverse(hot),
    line.prior(20_000, 1),
    sg.grids.log_snr(line, 500, end=1e-3),
    sg.Exponential(2),
    0,
)
print(f"variance {y.var():.4f}; v / (2a - 1) = {v / (2 * a - 1):.4f}, v / a = {v / a:.4f}")
assert abs(float(y.var()) - v / (2 * a - 1)) < 0.01

# %% [markdown]
# **2.** Scale only the Langevin part: $s+\frac{\eta^2}{1+\eta^2}(a-1)s$. Check that now the
# variance is $v/a$, for $\eta=1$ and for $\eta=2$.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
for eta in (1.0, 2.0):
    part = (1 + eta**2 / (1 + eta**2) * (a - 1)) * normal
    y = sg.solve(
        line.reverse(part, eta),
        line.prior(20_000, 1),
        sg.grids.log_snr(line, 1500, end=1e-3),
        sg.Exponential(2),
        0,
    )
    print(f"eta = {eta}: variance {y.var():.4f}, v / a = {v / a:.4f}")
    assert abs(float(y.var()) - v / a) < 0.012

# %% [markdown]
# **3.** How does the overshoot on the line depend on $\gamma$? Compute the exact mean of the
# guided flow for $\gamma=0,\dots,8$ and compare it with the product's.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
print("gamma  flow   product")
means_of_flow = []
for g in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
    partial = (v_c / (v_c + w)) ** ((1 + g) / 2) * (v_u / (v_u + w)) ** (-g / 2)
    mean = float(torch.trapezoid(0.5 * (1 + g) * mu / (v_c + w) * partial * w, log_w.to(w)))
    limit = (1 + g) * mu / v_c / ((1 + g) / v_c - g / v_u)
    print(f"{g:5}  {mean:.3f}  {limit:.3f}")
    means_of_flow.append(mean)
    assert mean >= limit - 0.01
print("Both tend to mu / (1 - v_c / v_u) = 1.43: the product from below, the flow from above.")
assert max(means_of_flow) > 1.6 > 1.43 > limit

# %% [markdown]
# ## What to remember
#
# - Score plus classifier gradient is Bayes' rule, exact at every noise level. Scaled, it is not
#   the score of anything.
# - Guidance samples neither the class nor the product: it overshoots and narrows. Now $\eta$ and
#   the solver matter.
# - Noise and Langevin steps bring it nearer to the product; an interval leaves out the part that
#   does most harm.
