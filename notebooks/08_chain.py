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
# # 8. From the VAE to the chain to the SDE
#
# **A diffusion model is a VAE with a thousand latents and nothing to learn in its encoder. What
# does its bound on the likelihood lose, and where?**
#
# The other notebooks start from an SDE. History started from a latent variable, and so do most
# lectures. Here is their road: one latent, a chain of them, the bound term by term, and the limit,
# where the SDE is found again. Everything is compared with exact answers, because laws on the line
# and Gaussian data have them.
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
from sde_gen import data, grids, plots
from sde_gen.chain import Hybrid, NodeTimes
from sde_gen.networks import UNet
from sde_gen.schedules import Cosine, Linear, Quadratic, Sigmoid, Tabulated

torch.set_default_dtype(torch.float64)
BLUE, RED, GREEN, PINK, GOLD = plots.COLOURS[:5]

# %% [markdown]
# ## One latent
#
# A variational autoencoder has a prior $p(z)=\mathcal N(0,1)$, a decoder $p(x\mid z)$ and an
# encoder $q(z\mid x)$, and is trained by
#
# $$-\log p(x)\;\le\;\mathrm E_q[-\log p(x\mid z)]+\mathrm{KL}(q(z\mid x)\,\|\,p(z)).$$
#
# Let the encoder do nothing but add noise, $z=\alpha x+\sigma\epsilon$ with $\alpha^2+\sigma^2=1$,
# and let the decoder be the best Gaussian: mean $D(z)=\mathrm E[x\mid z]$, and one variance. One
# number is left to choose, the noise. With little of it $z$ tells $x$, but the encoded data are
# nothing like the prior: samples of the prior are *atypical*, and decode to what never was data.
# With much of it they fit, and $z$ tells nothing.
#
# A VAE with one latent is a chain of one step:

# %%
sde = sg.VP()
law = sg.GaussianMixture(sde, [0.35, 0.4, 0.25], torch.tensor([[-1.2], [0.2], [1.3]]), 0.15)
x = law.sample(4000, torch.Generator().manual_seed(0))
truth = -law.log_prob(x, 0.0).mean()
normal = sg.Moments(torch.ones(1))  # the prior N(0, 1)


def loses(chain, **options):
    """L_0, L_T and what the bound is over the truth, in nats, each step's variance its best."""
    options = {"variance": chain.errors(law, x), "prior": normal, "draws": 1, **options}
    found = sg.bound(law, x, chain, **options).mean()
    return float(found.reconstruction), float(found.prior), float(found.total - truth)


levels = torch.linspace(4, -4, 33)
one = torch.tensor([loses(sg.Chain(sde, sde.time_at(v).reshape(1))) for v in levels])
many = {
    n: loses(sg.Chain(sde, grids.information(sde, n, end=0.01, reference=0.9, to_zero=True)))[2]
    for n in (8, 16, 32, 64)
}
many = {1: float(one[:, 2].min()), **many}
for n, gap in many.items():
    print(f"{n:3d} latents: {gap:.3f} nats over the truth")
assert many[1] > 0.25
assert many[64] < 0.02

axis = torch.linspace(-3.2, 3.2, 400)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 3.4), layout="constrained", dpi=120)
left, middle, right = figure.subplots(1, 3)
for v, colour in zip((3.0, 0.0, -3.0), (BLUE, RED, GREEN), strict=True):
    t = sde.time_at(torch.tensor(v))
    label = rf"encoded, $\sigma/\alpha$ = {math.exp(-v / 2):.2g}"
    left.plot(axis, law.log_prob(axis[:, None], t).exp(), color=colour, lw=2, label=label)
left.plot(axis, torch.exp(-(axis**2) / 2) / math.sqrt(2 * math.pi), "k:", lw=1.5, label="prior")
left.set(title="all encoded data", xlabel="$z$", yticks=[], ylim=(0, 0.95))
left.legend(frameon=False, fontsize="small", loc="upper left")
ratio = torch.exp(-levels / 2)
middle.plot(ratio, one[:, 0], color=BLUE, lw=2, label="decoder, $L_0$")
middle.plot(ratio, one[:, 1], color=RED, lw=2, label="prior, $L_T$")
middle.plot(ratio, one[:, 2] + truth, color="black", lw=2, label="the bound")
middle.axhline(truth, color=plots.QUIET, ls=":", label=r"truth, $-\log p$")
middle.set(xscale="log", xlabel=r"noise $\sigma/\alpha$", ylabel="nats", title="one latent")
middle.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
middle.minorticks_off()
middle.legend(frameon=False, fontsize="small")
right.loglog(list(many), list(many.values()), "o-", color="black", lw=2)
right.set(xlabel="latents", title="many latents: the bound over the truth", ylabel="nats")
right.set_xticks(list(many), list(map(str, many)))
right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
right.minorticks_off()
figure

# %% [markdown]
# So take many latents, each a little noisier than the one before: a **hierarchical** VAE. Every
# step back undoes little noise, which a Gaussian can; the last latent has forgotten the data, so
# it fits the prior. The latents are as large as the data and the encoder is never trained.
#
# ## The bound
#
# $q(x_t\mid x_{t-1})=\mathcal N(\sqrt{1-\beta_t}\,x_{t-1},\beta_t)$ forward, a model
# $p(x_{t-1}\mid x_t)$ back. Jensen's inequality, for the whole chain:
#
# $$-\log p(x_0)=-\log\mathrm E_q\frac{p(x_{0:N})}{q(x_{1:N}\mid x_0)}\;\le\;
#   \mathrm E_q\log\frac{q(x_{1:N}\mid x_0)}{p(x_{0:N})}.$$
#
# It could be trained on as it stands: draw a path, add up logarithms. The second idea of the
# derivation is to condition on $x_0$, which changes nothing in a Markov chain, and use Bayes'
# rule:
#
# $$q(x_t\mid x_{t-1})=q(x_t\mid x_{t-1},x_0)=
#   \frac{q(x_{t-1}\mid x_t,x_0)\;q(x_t\mid x_0)}{q(x_{t-1}\mid x_0)} .$$
#
# The last two factors telescope along the chain, and what is left are divergences between
# Gaussians, which need no draws:
#
# $$\underbrace{\mathrm{KL}(q(x_N\mid x_0)\,\|\,p(x_N))}_{L_T}+\sum_{t=2}^N
#   \underbrace{\mathrm E\,\mathrm{KL}(q(x_{t-1}\mid x_t,x_0)\,\|\,p(x_{t-1}\mid x_t))}_{L_{t-1}}
#   +\underbrace{\mathrm E[-\log p(x_0\mid x_1)]}_{L_0}.$$
#
# Both sums have the same mean. What is the second one for?

# %%
chain = sg.Chain(sde, grids.information(sde, 100, end=0.01, reference=0.9, to_zero=True))
variance = chain.errors(law, x)
x_0 = torch.full((4000, 1), 0.3)
g = torch.Generator().manual_seed(1)


def log_ratios(x_0):
    """Of log q(x_1..x_N | x_0) / p(x_0..x_N) what each step adds, along a path from each x_0."""
    added, before = [], x_0
    for t in range(1, len(chain) + 1):
        q = chain.forward(before, t, t - 1)
        x_t = q.sample(torch.randn(x_0.shape, generator=g))
        back = chain.step(law, x_t, t, variance=variance)
        added.append(q.log_density(x_t) - back.log_density(before))
        before = x_t
    end = 0.5 * (before.square() + math.log(2 * math.pi)).sum(1)
    return torch.stack(added, 1), end


steps, end_of_path = log_ratios(x_0)
bound = sg.bound(law, x_0, chain, variance=variance, prior=normal, draws=1)
all_but_one, row = len(chain) - 1, torch.arange(len(x_0))
at = torch.randint(1, len(chain), (len(x_0),), generator=g)
rest = bound.prior.value + bound.reconstruction.value
ways = {
    "path, all steps": steps.sum(1) + end_of_path,
    "path, one step": steps[:, 0] + all_but_one * steps[row, at] + end_of_path,
    "divergences, all": bound.total.value,
    "divergences, one": rest + all_but_one * bound.steps.value[row, at - 1],
}
error = {name: float(draws.std()) / len(x_0) ** 0.5 for name, draws in ways.items()}
for name, draws in ways.items():
    print(f"{name:17} {draws.mean():6.3f} +- {error[name]:.3f}, spread {draws.std():6.2f}")
print(f"{'truth':17} {float(-law.log_prob(x_0[:1], 0.0)):6.3f}")
mean, least = ways["path, all steps"].mean(), error["path, all steps"]
assert all(abs(v.mean() - mean) < 4 * (error[k] + least) for k, v in ways.items())
assert error["divergences, one"] < error["path, one step"] / 3

# %% [markdown]
# Along a whole path the first form is not bad at all: if the model were right, $q/p$ would be the
# same on every path. But its steps balance each other, and one of them alone is mostly noise. A
# divergence stands alone. So one draw of $t$ is enough for a step of training, and no
# path is ever made: that is algorithm 1 of Ho et al. (2020).
#
# ## Three readings of one term
#
# With $w=(\sigma/\alpha)^2$, $s$ the cleaner of two nodes and $t$ the noisier one, Bayes' rule for
# Gaussians gives
#
# $$q(x_s\mid x_t,x_0)=\mathcal N\big(a\,x_t+b\,x_0,\;\tilde v\big),\qquad
#   a=\frac{w_s}{w_t}\frac{\alpha_s}{\alpha_t},\quad
#   b=\alpha_s\Big(1-\frac{w_s}{w_t}\Big),\quad \tilde v=\sigma_s^2\Big(1-\frac{w_s}{w_t}\Big).$$
#
# The model has $D(x_t)$ where that has $x_0$. With the same variance the divergence is the squared
# distance of the means over $2\tilde v$, and because $x_t=\alpha x_0+\sigma z$ that can be told as
# an error of the data, of the noise, or of the score $-z/\sigma$:
#
# $$L_{t-1}=\tfrac12\Big(\tfrac1{w_s}-\tfrac1{w_t}\Big)\mathrm E|x_0-D|^2
#   =\tfrac12\Big(\tfrac{w_t}{w_s}-1\Big)\mathrm E|z-\hat z|^2
#   =\tfrac12\Big(\tfrac{w_t}{w_s}-1\Big)\sigma_t^2\;\mathrm E|s-\hat s|^2 .$$

# %%
ddpm = sg.Chain(sg.VP(Tabulated(torch.linspace(1e-4, 0.02, 1000))))
z, x_0 = torch.randn(2, 5, 3, generator=g)
t = 400
alpha, sigma = ddpm.nodes.alpha[t], ddpm.nodes.sigma[t]
x_t = alpha * x_0 + sigma * z
ways = {"data": x_0, "noise": z, "score": -z / sigma}
means = [ddpm.posterior(x_t, t, **{name: value}).mean for name, value in ways.items()]
print("the three means differ by", f"{float(max((m - means[0]).abs().max() for m in means)):.0e}")
assert all(torch.allclose(m, means[0], atol=1e-12) for m in means)

w = torch.exp(-ddpm.nodes.log_snr)
w_s, w_t, number = w[1:-1], w[2:], torch.arange(2, 1001)
weights = {
    "of the data, $|x_0-D|^2$": (1 / w_s - 1 / w_t) / 2,
    r"of the noise, $|z-\hat z|^2$": (w_t / w_s - 1) / 2,
    r"of the score, $|s-\hat s|^2$": (w_t / w_s - 1) / 2 * ddpm.nodes.sigma[2:] ** 2,
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(7.5, 3.3), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, weight), colour in zip(weights.items(), (BLUE, RED, GREEN), strict=True):
    ax.semilogy(number, weight, color=colour, lw=2, label=name)
ax.axhline(weights[r"of the noise, $|z-\hat z|^2$"].mean(), color=RED, ls=":", lw=1)
ax.text(430, 0.018, r"$L_\mathrm{simple}$: all alike", color=RED)
ax.set(xlabel="$t$", title="what an error weighs in the bound, 1000 linear steps")
ax.legend(frameon=False)
figure

# %% [markdown]
# One and the same term; but whoever drops the weight in front of the *noise* error, as
# $L_\mathrm{simple}$ does, has another loss than who drops that of the data. The bound weighs the
# first steps most, where the eye sees nothing.
#
# ## Four schedules, and how many steps
#
# A schedule says when the data are lost. Four common ones, each with the noise of its own:

# %%
CLOCKS = {"linear": Linear(), "cosine": Cosine(), "quadratic": Quadratic(), "sigmoid": Sigmoid()}
digit = data.digits("train").x[[5]].double()
rows = [
    sg.VP(clock).perturb(digit, torch.tensor(t), torch.Generator().manual_seed(3)).x
    for clock in CLOCKS.values()
    for t in torch.linspace(0, 1, 13).tolist()
]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2, width_ratios=[2.6, 1])
plots.image_grid(torch.cat(rows), 4, list(CLOCKS), "one digit, $t$ from 0 to 1", ax=left)
u = torch.linspace(0, 1, 200)
for (name, clock), colour in zip(CLOCKS.items(), plots.COLOURS, strict=False):
    right.plot(u, sg.VP(clock).alpha(u) ** 2, color=colour, lw=2, label=name)
right.set(title=r"$\bar\alpha_t=\alpha_t^2$, what is left of it", xlabel="$t$")
right.legend(frameon=False, fontsize="small")
figure

# %% [markdown]
# For Gaussian data, $\mathcal N(0,v)$, all terms are known, for any variance of the model's steps:
# with $1+u=\frac{w_t(v+w_s)}{w_s(v+w_t)}$ and $k$ the variance over $\tilde v$,
#
# $$L_{t-1}=\tfrac12\Big[\log k-1+\frac{1+u}k\Big]\;\ge\;\tfrac12\log(1+u),$$
#
# with equality at $k=1+u$, and then *nothing* is lost, in any number of steps. Two variances are
# in common use: $\tilde v$ ("small", $k=1$) and $\beta_t$ ("large"). What they lose, a coordinate,
# for $v=0.25$, about that of images on $[-1,1]$:

# %%
v = sg.Moments(torch.tensor([0.25]))


def lost(chain, variance):
    """What each step loses, in bits a dimension."""
    return (chain.expected(v, variance) - chain.expected(v, v)) / math.log(2)


print("bits a dimension   " + "".join(f"{f'N = {n}':>18}" for n in (100, 700, 4000)))
for name, clock in CLOCKS.items():
    cells = []
    for n in (100, 700, 4000):
        part = sg.Chain(sg.VP(clock), torch.arange(1, n + 1) / n)
        small, large = (float(lost(part, k).sum()) for k in ("small", "large"))
        cells.append(f"{small:9.3f}/{large:8.5f}")
        assert large < small
    print(f"{name:9} small/large{''.join(cells)}")
flat = float(lost(sg.Chain(sg.VP(Sigmoid()), torch.arange(1, 10**5 + 1) / 10**5), "small").sum())
print(f"small, N = 100,000: {flat:.4f}; Euler's constant / 2: {0.5772157 / 2 / math.log(2):.4f}")
assert abs(flat - 0.5772157 / 2 / math.log(2)) < 2e-3

# %% [markdown]
# The small variance does not get there, ever. However many the steps are, the second node has
# twice the noise of the first, the third half as much again, and the losses
# $\frac12[\frac1k-\log(1+\frac1k)]$ add up to $\frac12\gamma$, with $\gamma$ Euler's constant. So
# it is with every schedule that starts at a finite rate, if the first node comes ever nearer to
# the data, $t_1=1/N$. From a fixed one on the loss does go to 0; we come to that.
#
# The cosine schedule was made to lose less in the first steps. The tables that were published with
# it (Nichol & Dhariwal 2021) are chains here, a `Tabulated` clock each, and three of their figures
# have closed forms:

# %%
angle = (torch.arange(4001) / 4000 + 0.008) / 1.008 * math.pi / 2
abar = (angle.cos() / angle[0].cos()) ** 2


def published(name, n):
    """Betas on a line, 0.1 / N to 20 / N; or of the cosine, clipped at 0.999."""
    step = abar[:: 4000 // n]
    cosine = (1 - step[1:] / step[:-1]).clamp_max(0.999)
    betas = torch.linspace(0.1, 20, n) / n if name == "linear" else cosine
    return sg.Chain(sg.VP(Tabulated(betas)))


figure = Figure(figsize=(13, 3.4), layout="constrained", dpi=120)
first, second, third = figure.subplots(1, 3)
share = {}
for name, colour in (("linear", BLUE), ("cosine", RED)):
    for n, style in ((100, ":"), (1000, "--"), (4000, "-")):
        part, at = published(name, n), torch.arange(2, n + 1)
        small, large = (part.variance(at, at - 1, k).flatten() for k in ("small", "large"))
        label = f"{name}, N = {n}"
        second.semilogx(at / n, small / large, style, color=colour, lw=1.5, label=label)
    a = part.nodes.alpha**2
    first.plot(part.times, a, color=colour, lw=2, label=name)
    terms = part.expected(v, v) / math.log(2)
    third.loglog(at / n, terms, color=colour, lw=2, label=name)
    learnt = 0.5 * torch.log2(1 + 0.25 * a[1:] / (1 - a[1:]))  # telescopes
    share[name] = float(terms[:100].sum() / terms.sum())
    assert torch.allclose(terms, -learnt.diff(), rtol=1e-6)
    assert abs(share[name] - float((learnt[0] - learnt[100]) / (learnt[0] - learnt[-1]))) < 1e-6
first.set(title=r"$\bar\alpha_t$ of the tables", xlabel="$t/N$")
second.set(title=r"$\tilde\beta_t/\beta_t$: where the variance matters", xlabel="$t/N$")
third.set(title="terms of the bound, N = 4000, bits", xlabel="$t/N$")
for ax in (first, second, third):
    ax.legend(frameon=False, fontsize="small")
print("the first 100 of 4000 terms hold", {k: f"{100 * s:.0f} %" for k, s in share.items()})
assert share["linear"] > share["cosine"] > 0.3
figure

# %% [markdown]
# ## What the bound loses, and where
#
# $\tilde\beta/\beta\to1$ after a few steps, so surely the variance does not matter? The middle
# figure says so and deceives, for the first steps have most of the bound. Since $\log(1+u)$ is a
# difference of $\log(1+v/w)$, a fixed number of steps loses least when they are even in
# *information*, $\log(1+v/w)$.

# %%
CASES = {
    "small, times even": (grids.uniform, "small", BLUE),
    "small, log SNR even": (grids.log_snr, "small", GREEN),
    "small, information even": (grids.information, "small", PINK),
    "large, times even": (grids.uniform, "large", RED),
}


def case(name, n):
    make, variance, _ = CASES[name]
    options = {"reference": 0.25} if make is grids.information else {}
    part = sg.Chain(sde, make(sde, n, end=1e-3, **options))
    return part, lost(part, variance)


table = {name: [float(case(name, n)[1].sum()) for n in (10, 100, 1000)] for name in CASES}
print("bits a dimension over the truth, N = 10, 100, 1000")
for name, row in table.items():
    print(f"{name:24}" + "".join(f"{value:10.4f}" for value in row))
assert abs(table["small, times even"][2] - 0.4427 / math.log(2)) < 1e-4
assert abs(table["small, information even"][2] - 0.0150 / math.log(2)) < 1e-4
assert abs(table["large, times even"][2] - 0.0011 / math.log(2)) < 1e-4

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.5), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
for name, (_, _, colour) in CASES.items():
    part, each = case(name, 1000)
    noise = torch.exp(-part.nodes.log_snr[2:] / 2)
    left.loglog(noise, each.clamp_min(1e-12), color=colour, lw=2, label=name)
    right.semilogx(noise, each.flip(0).cumsum(0).flip(0), color=colour, lw=2)
left.set(title="what each of 1000 steps loses, bits a dimension", ylim=(1e-10, 1))
right.set(title="added up, from the noise to the data")
for ax in (left, right):
    ax.set(xlabel=r"noise to signal $\sigma/\alpha$")
left.legend(frameon=False, fontsize="small", loc="lower left")
figure

# %% [markdown]
# **0.64 bits a dimension, at a thousand steps, are the choice of a variance and nothing else**,
# and they are lost where the noise is below a tenth of the data, in steps that hardly show. The
# same chain with the large variance loses 0.002 bits, and with the best one nothing.
#
# Real data are no Gaussian, and the best variance has to be found. Two ways: from the denoiser's
# errors, $v_p=\tilde v+b^2\,\mathrm E|x_0-D|^2/n$ (`chain.errors`, no training), or by a second
# output of the network, that says where between small and large in the logarithm, trained by the
# bound itself, $L_\mathrm{simple}+0.001\,L_\mathrm{vlb}$ (`Hybrid`). Less than a minute on digits,
# whose pixels have 17 levels, $\frac2{17}$ apart. The chain starts with noise of half of that, and
# $L_0$ is the probability of the levels under its last Gaussian.

# %%
torch.set_default_dtype(torch.float32)
train, test = data.digits("train"), data.digits("test")
facts = sg.Facts.of(train.x, levels=17)
end = float(sde.time_at(torch.tensor(-2 * math.log(0.06))))
times = grids.information(sde, 100, end=end, reference=facts.variance, to_zero=True)
nodes = sg.Chain(sde, times)
torch.manual_seed(0)
net = UNet((1, 8, 8), 32, (1, 2), blocks=0, width=64, classes=10, head=True)
model = sg.train(
    sg.ScoreNetwork(net, sde, facts=facts),
    *train,
    recipe=sg.Recipe(steps=400, batch=128, lr=4e-3),
    objective=Hybrid(NodeTimes.of(nodes), dropout=0.2, n_levels=17),
    progress=False,
    device="cpu",
)

# %%
seen = slice(100)
levels, given = data.quantise(test.x[seen], 17), model.given(y=test.y[seen])
errors = nodes.errors(model.given(y=train.y[:400]), train.x[:400])
VARIANCES = {"small": "small", "large": "large", "estimated": errors, "learned": "learned"}
found = {
    name: sg.bound(given, levels, nodes, variance=variance, draws=1).mean()
    for name, variance in VARIANCES.items()
}
for name, b in found.items():
    print(f"{name:10} N = 100 {b.bits_per_dim} bits a dimension")
bits = {name: float(b.bits_per_dim) for name, b in found.items()}
assert max(bits["estimated"], bits["learned"]) < min(bits["small"], bits["large"])

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=120)
ax = figure.subplots()
noise = torch.exp(-nodes.nodes.log_snr / 2)[2:].flip(0)
noise = torch.cat([noise, torch.tensor([0.04])])  # where the last point, with L_0, is drawn
for (name, b), colour in zip(found.items(), (BLUE, RED, GREEN, PINK), strict=True):
    parts = torch.cat([b.steps.value.flip(0), b.reconstruction.value[None]])
    sums = parts.cumsum(0) / b.dimensions / math.log(2)
    ax.semilogx(noise, sums, color=colour, lw=2, label=f"{name}, {bits[name]:.2f}")
    ax.plot(noise[-1], sums[-1], "o", color=colour)
ax.set(xlabel=r"noise to signal $\sigma/\alpha$, and then $L_0$", ylabel="bits a dimension")
ax.set(title="the bound on unseen digits, added up from the noise to the data")
ax.legend(frameon=False)
figure

# %% [markdown]
# Once more the small variance loses nearly all of it at the end, in $L_0$, and the large one a
# little everywhere. What was merely *counted* is almost as good as what was learned. Ten times as
# many steps do not make up for a wrong variance:

# %%
thousand = sg.Chain(sde, grids.uniform(sde, 1000, end=end, to_zero=True))
slow = sg.bound(given, levels, thousand, variance="small", terms=60).mean().bits_per_dim
print(f"small, N = 1000, times even: {slow} bits, from 60 of the steps, drawn")
print(f"learned, N = 100: {found['learned'].bits_per_dim}")
assert float(slow) > bits["learned"] + 0.1

# %% [markdown]
# ## The limit
#
# Let the first node stay where it is, and $N$ grow. Four things happen, all at the rate $1/N$.
#
# - The forward chain is Euler's scheme for
#   $\mathrm dx=-\frac12\beta x\,\mathrm dt+\sqrt\beta\, \mathrm dw$:
#   $\log\bar\alpha_N\to-\int\beta$.
# - The ancestral sampler becomes the **reverse SDE**: its law is right in the limit. With the
#   small variance samples are too narrow, with the large one too wide, and the two become equal.
# - What a fixed variance loses goes to 0; even in information it is
#   $\frac{1}{4N}\big[\log\frac{1+v/w_1}{1+v/w_N}\big]^2$.
# - The sum of the terms becomes an integral, $\frac12\int\mathrm E|x_0-D|^2\,\mathrm d(1/w)$, the
#   likelihood-weighted denoising loss. With the exact $D$ that is the information between data and
#   noised data (Guo, Shamai & Verdú 2005), so the bound becomes the truth for *any* law.

# %%
torch.set_default_dtype(torch.float64)
end, line = 0.01, torch.linspace(-8, 8, 8001)[:, None]


def of_law(t):
    """E|x_0 - D|^2 of the mixture, and the information I(x_0; x_t), by quadrature."""
    log_p, D = law.log_prob(line, t), law.denoise(line, t)[:, 0]
    second = float(law.log_weights.exp() @ (law.means.square().sum(1) + 0.15**2))
    miss = second - float((log_p.exp() * D**2).sum() * 0.002)
    entropy = -float((log_p.exp() * log_p).sum() * 0.002)
    return miss, entropy - 0.5 * math.log(2 * math.pi * math.e * float(sde.sigma(t)) ** 2)


limit = of_law(torch.tensor(end))[1] - of_law(torch.tensor(0.999))[1]
gauss, unit = sg.Gaussian(sde, torch.zeros(1), 0.5), torch.ones(1, 1)
sizes, rates = [16, 32, 64, 128, 256, 512], {}


def add(name, value):
    rates.setdefault(name, []).append(float(value))


for n in sizes:
    chain = sg.Chain(sde, grids.information(sde, n, start=0.999, end=end, reference=0.9))
    miss = torch.tensor([of_law(t)[0] for t in chain.times[1:]])
    add("terms less their integral, mixture", chain.expected(miss).sum() - limit)
    even = sg.Chain(sde, grids.information(sde, n, end=end, reference=0.25))
    add("bound less truth, Gaussian", lost(even, "small").sum() * math.log(2))
    for kind, sign in (("small", 1), ("large", -1)):
        chain = sg.Chain(sde, grids.log_snr(sde, n, end=end))
        first, last = (sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2 for t in chain.times[[1, -1]])
        for t in range(len(chain), 1, -1):
            p = chain.step(gauss, unit, t, variance=kind)
            last = p.mean**2 * last + p.variance
        add(f"variance of the sampler, {kind}", sign * (1 - last / first))
    if n > 20:
        betas = torch.linspace(0.1, 20, n) / n
        add(r"forward chain, $\log\bar\alpha_N$", -torch.log1p(-betas).sum() - 10.05)
figure = Figure(figsize=(7.5, 4), layout="constrained", dpi=120)
ax = figure.subplots()
for (name, values), colour in zip(rates.items(), plots.COLOURS, strict=False):
    order = math.log2(values[-2] / values[-1])
    print(f"{name:36} order {order:.2f}")
    assert abs(order - 1) < 0.1
    ax.loglog(sizes[-len(values) :], values, "o-", color=colour, lw=2, ms=4, label=name)
w = torch.exp(-sde.log_snr(torch.tensor([end, 1.0])))
L = torch.log((1 + 0.25 / w[0]) / (1 + 0.25 / w[1]))
ax.loglog(sizes, [float(L**2) / 4 / n for n in sizes], "k:", lw=1.5, label="$L^2/4N$")
ax.set(xlabel="$N$", title="what is left at $N$ steps", xticks=sizes, xticklabels=sizes)
ax.minorticks_off()
ax.legend(frameon=False, fontsize="small")
figure

# %% [markdown]
# So the chain is not a cruder model than the SDE; it *is* the SDE, seen at $N$ times, and the
# SDE's likelihood-weighted loss is its bound. From here on the schedule is but a clock.
#
# ## Changing the schedule of a trained denoiser
#
# The network above was trained on the linear clock. What it has learned is $D$, a function of
# $y=x/\alpha$ and $w$, and these every process has. So it serves under any other: match the times
# by $(1-\bar\alpha)/\bar\alpha=w$. `model.under(sde)` is the same network under another process.

# %%
OTHERS = {"linear": sde, "cosine": sg.VP(Cosine()), "VE": sg.VE(), "EDM": sg.EDM()}
ratios = torch.tensor([40.0]) * torch.linspace(1, 0, 21)[:-1] ** 5
ratios = torch.cat([ratios.clamp_min(0.005), torch.zeros(1)])
ratios = torch.unique(ratios).flip(0)
digits = {}
for name, other in OTHERS.items():
    under = model.under(other).given(y=torch.arange(10))
    digits[name] = sg.sample(under, 10, seed=4, times=grids.from_table(other, ratios))
    t, s = 0.3, other.time_at(sde.log_snr(0.3))
    print(f"{name:8} t = 0.3 is {float(s):.4f} here", end=", ")
    print(f"samples differ by {float((digits[name] - digits['linear']).abs().max()):.0e}")
    assert (digits[name] - digits["linear"]).abs().max() < 1e-2
plots.image_grid(torch.cat(list(digits.values())), 4, list(digits), "one network, four processes")

# %% [markdown]
# The same noise becomes the same digits, because the four runs are one equation in $y$ and $w$.
# The chain's bound does not know the difference either:

# %%
cosine = sg.VP(Cosine())
same = sg.Chain(cosine, cosine.time_at(sde.log_snr(nodes.times[1:])))
under = model.under(cosine).given(y=test.y[seen])
moved = sg.bound(under, levels, same, variance="learned", draws=1)
gap = float(moved.mean().bits_per_dim - found["learned"].bits_per_dim.value)
print(f"the bound under the cosine clock, at the same levels, differs by {gap:.1e} bits")
assert abs(gap) < 1e-3

# %% [markdown]
# ## Exercises
#
# Each plants a fault that was published or shipped. Find it by a comparison with something exact.
#
# **1.** *Alpha for beta.* A posterior for a step of DDPM, from a textbook. Where is the fault?
# (Draw $x_t$ from $q(x_t\mid x_0)$ and $x_{t-1}$ from the posterior: what must the law of
# $x_{t-1}$ be?)

# %%
beta = torch.linspace(1e-4, 0.02, 1000)
alpha_bar = torch.cumprod(1 - beta, 0)


def posterior(x_t, x_0, t, a=beta, b=1 - beta):
    """Mean and variance of q(x_(t-1) | x_t, x_0), t counted from 0."""
    rest = 1 - alpha_bar[t]
    mean = b[t].sqrt() * (1 - alpha_bar[t - 1]) * x_t + alpha_bar[t - 1].sqrt() * b[t] * x_0
    return mean / rest, a[t] * (1 - alpha_bar[t - 1]) / rest


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def through(mean_of, t=500, x_0=0.7):
    """Mean and variance of x_(t-1), of x_t ~ q(x_t | x_0), in closed form: the mean is linear."""
    at_0, variance = mean_of(0.0, x_0, t)
    slope = mean_of(1.0, x_0, t)[0] - at_0
    mean = at_0 + slope * alpha_bar[t].sqrt() * x_0
    return float(mean), float(slope**2 * (1 - alpha_bar[t]) + variance)


def mended(x_t, x_0, t):
    rest = 1 - alpha_bar[t]
    mean = (1 - beta[t]).sqrt() * (1 - alpha_bar[t - 1]) * x_t
    mean = mean + alpha_bar[t - 1].sqrt() * beta[t] * x_0
    return mean / rest, beta[t] * (1 - alpha_bar[t - 1]) / rest


wanted = (float(alpha_bar[499].sqrt() * 0.7), float(1 - alpha_bar[499]))
for name, pair in (("x_499", wanted), ("code", through(posterior)), ("mended", through(mended))):
    print(f"{name:6} mean {pair[0]:.4f}, variance {pair[1]:.4f}")
print("The weight of x_0 has alpha_t where beta_t belongs.")
assert all(abs(a - b) < 1e-12 for a, b in zip(through(mended), wanted, strict=True))
assert abs(through(posterior)[0] - wanted[0]) > 0.1
x_t = torch.randn(4, 1)
p = ddpm.posterior(x_t, 501, data=torch.full((4, 1), 0.7))
assert torch.allclose(p.mean, mended(x_t, 0.7, 500)[0])

# %% [markdown]
# **2.** *The mean for the sum.* Below is the bound of a whole chain, on Gaussian data, as a public
# trainer of learned variances had it. Its loss looks fine and the variances hardly move. Compare
# it with $-\log p$. What is wrong, and by how much?


# %%
def l_vlb(law, x, chain):
    """The bound of the chain, nats a dimension."""
    g, terms = torch.Generator().manual_seed(5), []
    for t in range(1, len(chain) + 1):
        x_t = chain.forward(x, t).sample(torch.randn(x.shape, generator=g))
        p = chain.step(law, x_t, t, variance=law.facts.moments)
        if t == 1:
            terms.append(-p.log_density(x))
        else:
            terms.append(chain.posterior(x_t, t, data=x).kl(p))
    return torch.stack(terms).mean(0)


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
few = sg.Chain(sde, grids.information(sde, 50, reference=0.25, to_zero=True))
points = gauss.sample(2000, torch.Generator().manual_seed(6))
entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
by_code = float(l_vlb(gauss, points, few).mean())
print(f"the code {by_code:.4f} nats, the entropy of the data {entropy:.4f}")
print(f"50 times the code: {50 * by_code:.4f}. A bound is the sum over the steps, not their mean:")
print("as part of a loss, times 0.001, it was N times too small to teach anything.")
assert by_code < entropy / 10  # no bound
assert abs(50 * by_code - entropy) < 0.1

# %% [markdown]
# **3.** *The wrong beta for fewer steps.* To sample in 50 of 1000 steps, a public sampler took
# every twentieth $\alpha$-bar for the means, as one must, and every twentieth $\beta$ for the
# noise of the large variance. What variance has a sample of $\mathcal N(0,v)$ then, at $t=1$?

# %%
part = ddpm.strided(50)
at = torch.cat([torch.zeros(1), torch.linspace(1, 1000, 50).round()]).long()
picked = beta[at[1:] - 1]

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
law_50 = sg.Gaussian(ddpm.sde, torch.zeros(1), 0.5)
ends = {}
for name, betas in {"picked": picked, "its own": part.betas}.items():
    variance = part.nodes.alpha[-1] ** 2 * 0.25 + part.nodes.sigma[-1] ** 2
    for t in range(50, 1, -1):
        variance = part.step(law_50, unit, t).mean ** 2 * variance + betas[t - 1]
    ends[name] = float(variance)
right = float(part.nodes.alpha[1] ** 2 * 0.25 + part.nodes.sigma[1] ** 2)
print(f"variance at t = 1: {right:.4f}; by the chain's own betas {ends['its own']:.4f},")
print(f"by picked ones {ends['picked']:.4f}")
print("beta is what *one* step adds. A longer step adds 1 - abar_t / abar_s.")
assert abs(ends["picked"] - right) > 2 * abs(ends["its own"] - right)

# %% [markdown]
# ## What to remember
#
# - One Gaussian step cannot undo much noise; many can. That is the whole case for the chain.
# - Jensen gives the bound, conditioning on $x_0$ makes its terms divergences of Gaussians, and
#   each is an error of the data, of the noise or of the score, as you like.
# - The bound of Gaussian data loses nothing at the right variance. What is lost is lost in the
#   first steps, by a variance or a grid that does not suit.
# - As $N\to\infty$ there is a reverse SDE and a loss. The schedule is a clock, and a denoiser can
#   be moved to any other.
