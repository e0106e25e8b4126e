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
# # 11. VAE, GAN, diffusion: one judge
#
# **Three kinds of models draw pictures from noise. What does each of them make small, what does it
# therefore get wrong, and which number sees it?**
#
# First on the line, where every integral can be computed. Then digits: a VAE, a GAN and a latent
# diffusion model, trained for seconds on one CPU thread (`benchmarks/generators.py` wrote the
# files in `checkpoints`), under the same judge.
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
import math

import torch
from matplotlib.figure import Figure
from sklearn.svm import SVC

import sde_gen as sg
from sde_gen import contrast, data, metrics, plots
from sde_gen.latent import LatentModel
from sde_gen.training import load

BLUE, RED, GREEN, PINK, GOLD = plots.COLOURS[:5]

# %% [markdown]
# ## What is made small
#
# With enough data and a rich enough model all three end at the law of the data. Models are not
# rich enough, so it matters what they make small until then.
#
# - A VAE: a bound on $-\mathrm E\log q(x)$, which is $\mathrm{KL}(p\,\|\,q)$ and a constant.
# - A GAN against its best discriminator $D^*=p/(p+q)$: $2\,\mathrm{JS}(p,q)-\log4$.
# - Score matching: $\mathrm E_{p_t}|\nabla\log p_t-\nabla\log q_t|^2$, at every noise level $t$.
#
# Let the data have two modes and the model be one normal law. Where is each least?

# %%
line = torch.linspace(-9, 9, 3001, dtype=torch.float64)
dx = float(line[1] - line[0])
WEIGHTS, PLACES, WIDTH = (0.6, 0.4), (-2.0, 2.0), 0.5


def normal(x, m, s):
    """The density of N(m, s^2)."""
    return torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))


def two_modes(x, noise=0.0):
    """The density of the data, with noise of this deviation added."""
    s = math.hypot(WIDTH, noise)
    return sum(w * normal(x, m, s) for w, m in zip(WEIGHTS, PLACES, strict=True))


def kl(p, q):
    """KL(p || q) by quadrature."""
    return float((torch.xlogy(p, p) - torch.xlogy(p, q.clamp_min(1e-300))).sum() * dx)


def js(p, q):
    """The Jensen-Shannon divergence."""
    return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)


def fisher(p, q, m, s):
    """E_p |score of p - score of q|^2, q = N(m, s^2)."""
    score = torch.gradient(p.clamp_min(1e-300).log(), spacing=dx)[0]
    return float((p * (score + (line - m) / s**2) ** 2).sum() * dx)


p = two_modes(line)
means, stds = torch.linspace(-3, 3, 49), torch.linspace(0.3, 3.0, 46)
found = {"KL(p, q): VAE": [], "JS: GAN": [], "scores, no noise": []}
for m in means.tolist():
    for s in stds.tolist():
        q = normal(line, m, s)
        for name, value in zip(found, (kl(p, q), js(p, q), fisher(p, q, m, s)), strict=True):
            found[name].append(value)

best = {}
for name, values in found.items():
    i, j = divmod(int(torch.tensor(values).argmin()), len(stds))
    m, s = best[name] = float(means[i]), float(stds[j])
    print(f"{name:17} mean {m:5.2f}, deviation {s:.2f}")
mean = sum(w * m for w, m in zip(WEIGHTS, PLACES, strict=True))
spread = math.sqrt(
    WIDTH**2 + sum(w * (m - mean) ** 2 for w, m in zip(WEIGHTS, PLACES, strict=True))
)
assert abs(best["KL(p, q): VAE"][0] - mean) < 0.1  # the moments of the data
assert abs(best["KL(p, q): VAE"][1] - spread) < 0.1
assert abs(best["JS: GAN"][0] - PLACES[0]) < 0.4  # one mode
assert best["JS: GAN"][1] < 1
assert best["scores, no noise"] == best["KL(p, q): VAE"]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12, 3.3), layout="constrained", dpi=120)
for ax, (name, (m, s)), colour in zip(
    figure.subplots(1, 3), best.items(), (BLUE, RED, GREEN), strict=True
):
    ax.fill_between(line, p, color="0.85", label="data")
    ax.plot(line, normal(line, m, s), color=colour, lw=2, label=f"best: {m:.2g} ± {s:.2g}")
    ax.set(title=name, xlim=(-5, 5), yticks=[], ylim=(0, 0.85))
    ax.legend(frameon=False, fontsize="small", loc="upper right")
figure

# %% [markdown]
# The likelihood pays without bound where there are data and no model, so the VAE **covers**, what
# lies between included. JS pays at most $\log 2$, so a GAN may **leave out** a mode, and here
# that is the best it can do. With scores of a normal model, $\mathrm E|\nabla\log p-\nabla\log
# q|^2$ is, by parts, least at mean and variance of the data, where the likelihood is largest.
#
# ## What score matching does not see, and why there is noise
#
# Give the model two modes and the wrong weights, $q=0.1,\,0.9$. Between separate modes there are
# no data, and at a mode the score does not know how much mass it has: without noise the error is
# almost 0. Diffusion asks at every noise level, and at some of them the modes overlap.

# %%
WRONG = (0.1, 0.9)
noises = torch.logspace(-1, 1.2, 60, dtype=torch.float64)
wide = torch.linspace(-60, 60, 24_001, dtype=torch.float64)


def score_error(noise):
    """E_p |score of p - score of q|^2, the two laws noised."""
    s = math.hypot(WIDTH, noise)
    parts = [normal(wide, m, s) for m in PLACES]
    laws = [sum(w * part for w, part in zip(v, parts, strict=True)) for v in (WEIGHTS, WRONG)]
    step = float(wide[1] - wide[0])
    a, b = (torch.gradient(law.clamp_min(1e-300).log(), spacing=step)[0] for law in laws)
    return float((laws[0] * (a - b) ** 2).sum() * step)


errors = torch.tensor([score_error(float(s)) for s in noises], dtype=torch.float64)
# d/dw KL(p_w || q_w) = -1/2 E |difference of the scores|^2 (de Bruijn), w = noise^2
whole = float(torch.trapezoid(0.5 * errors * 2 * noises**2, noises.log()))
parts = [normal(wide, m, WIDTH) for m in PLACES]
step = float(wide[1] - wide[0])
laws = [sum(w * part for w, part in zip(v, parts, strict=True)) for v in (WEIGHTS, WRONG)]
ratio = torch.log(laws[0].clamp_min(1e-300) / laws[1].clamp_min(1e-300))
truth = float((laws[0] * ratio).sum() * step)
print(
    f"error of the scores without noise {score_error(0.0):.1e}, at its largest {errors.max():.2f}"
)
print(f"KL of the two laws {truth:.4f}; half the errors, summed over the noise added {whole:.4f}")
assert score_error(0.0) < 0.05 * errors.max()
assert abs(whole - truth) < 0.03 * truth

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9.5, 3.2), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
left.plot(wide, laws[0], color="black", lw=2, label="data")
left.plot(wide, laws[1], color=RED, lw=2, label="model: weights wrong")
left.set(xlim=(-5, 5), yticks=[])
left.legend(frameon=False, fontsize="small")
right.semilogx(noises, errors * noises**2, color=GREEN, lw=2)
right.set(xlabel="noise", title=r"$\sigma^2$ times the error of the score", ylim=(0, None))
figure

# %% [markdown]
# Summed over the noise with the weight of the likelihood, $\frac12\int\mathrm E|\cdot|^2\,\mathrm
# dw$, the errors *are* $\mathrm{KL}(p\,\|\,q)$: diffusion covers as the VAE does, but each of its
# terms is a regression.
#
# ## The game
#
# The generator is at distance $\delta$ from the data, $\mathcal N(\delta,0.3^2)$ against
# $\mathcal N(0,0.3^2)$, and the discriminator is the best one. In the minimax game the generator
# goes down $\mathrm E\log(1-D)$, with the discriminator held; in practice it goes down $-\mathrm
# E\log D$.

# %%
delta = torch.linspace(0.05, 2.5, 50, dtype=torch.float64)
z = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
values, slopes = [], {"log(1 - D)": [], "-log D": []}
for d in delta.tolist():
    shift = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    x = shift + 0.3 * z
    logit = (d**2 - 2 * d * x) / (2 * 0.09)  # log p(x) - log q(x), q held at d
    values.append(float(contrast.jensen_shannon((d**2 - 2 * d * 0.3 * z) / 0.18, logit).detach()))
    for name, wish in (
        ("log(1 - D)", torch.nn.functional.logsigmoid(-logit)),
        ("-log D", -torch.nn.functional.logsigmoid(logit)),
    ):
        (slope,) = torch.autograd.grad(wish.mean(), shift, retain_graph=True)
        slopes[name].append(float(slope.abs()))

far = {name: value[-1] for name, value in slopes.items()}
print(f"at delta = {delta[-1]:.1f}: slopes {far['log(1 - D)']:.0e} and {far['-log D']:.0f}")
assert abs(values[-1] - math.log(2)) < 1e-3
assert far["log(1 - D)"] < 1e-3 < far["-log D"]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(9.5, 3.2), layout="constrained", dpi=120)
left, right = figure.subplots(1, 2)
left.plot(delta, values, color="black", lw=2)
left.axhline(math.log(2), color=plots.QUIET, ls=":")
left.set(title="JS by the best discriminator", xlabel=r"$\delta$", ylim=(0, 0.75))
for (name, value), colour in zip(slopes.items(), (RED, BLUE), strict=True):
    right.semilogy(delta, value, color=colour, lw=2, label=name)
right.set(title="slope of what the generator makes small", xlabel=r"$\delta$", ylim=(1e-4, 1e3))
right.legend(frameon=False)
figure

# %% [markdown]
# Far away JS stands at $\log2$ and does not say where to go. The slope of the minimax game is gone
# there; the other one is not, but it is no longer the gradient of any distance of the two laws.
# And the discriminator that was exact here has to be learned, at the same time.
#
# ## Digits
#
# A VAE (whose encoder has noise of one deviation, 0.1), sampled from $\mathcal N(0,I)$ and from a
# Gaussian mixture for each class on its codes; a diffusion model of the codes of the same VAE; and
# a GAN, which had as much time as these two together: twenty seconds.

# %%
train, test = data.digits("train"), data.digits("test")
gan = load("checkpoints/gan", kind=contrast.GAN)
diffusion = load("checkpoints/unified", kind=LatentModel)
vae = contrast.VAE(diffusion.autoencoder)
mixture = vae.with_mixture(train.x, train.y, components=3)
y = torch.arange(500) % 10
samples = {
    "VAE, N(0, I)": vae.sample(500, seed=0),
    "VAE, mixture": mixture.sample(500, seed=0, y=y),
    "GAN": gan.sample(500, seed=0, y=y),
    "latent diffusion": sg.sample(diffusion.given(y=y), 500, seed=0),
}
with torch.no_grad():
    rebuilt = vae.codec.decode(vae.codec.encode(test.x))
drawn = {"test images": (test.x, test.y), **{name: (x, y) for name, x in samples.items()}}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(12.5, 4.6), layout="constrained", dpi=120)
for ax, (name, (x, labels)) in zip(figure.subplots(1, 5), drawn.items(), strict=True):
    rows = torch.cat([x[labels == c][:6] for c in range(10)])
    plots.image_grid(rows, 10, None, name, ax)
figure

# %% [markdown]
# The judge is a support vector machine, trained on the real training images. Its ten decision
# values are the features of the Fréchet distance; *coverage* is 1 minus the total variation of
# the frequencies of the classes that it sees; *sharpness* is the power of the finer waves over
# that of the data; *nearest* is the median distance to a training image.

# %%
judge = SVC(C=10).fit(train.x.flatten(1).numpy(), train.y.numpy())


def features(x):
    """The decision values."""
    return torch.from_numpy(judge.decision_function(x.flatten(1).numpy()))


def grade(x, y):
    """Fréchet, accuracy, coverage, sharpness, nearest."""
    taken = torch.from_numpy(judge.predict(x.flatten(1).numpy()))
    return (
        metrics.frechet_distance(x, train.x, features),
        float((taken == y).double().mean()),
        metrics.coverage(taken, torch.arange(10)),
        metrics.sharpness(x, train.x),
        float(metrics.nearest_neighbour_distance(x, train.x).median()),
    )


grades = {"test images": grade(test.x, test.y), "rebuilt by the VAE": grade(rebuilt, test.y)}
grades |= {name: grade(x, y) for name, x in samples.items()}
floor = grades["test images"][0]
print(f"{'':19}Frechet / floor  accuracy  coverage  sharpness  nearest")
for name, (frechet, right, cover, sharp, near) in grades.items():
    told = "     " if name == "VAE, N(0, I)" else f"{100 * right:3.0f} %"
    print(f"{name:19}{frechet / floor:10.2f}{told:>13}{cover:10.2f}{sharp:10.2f}{near:10.2f}")
for name in ("VAE, mixture", "latent diffusion"):
    assert grades[name][0] < grades["VAE, N(0, I)"][0] / 3
    assert abs(grades[name][3] - grades["rebuilt by the VAE"][3]) < 0.1
assert grades["rebuilt by the VAE"][3] < 0.9 < grades["GAN"][3]

# %% [markdown]
# One decoder, three priors: from $\mathcal N(0,I)$ it draws what no digit is; told where the codes
# lie, by a mixture or by diffusion, it is as near to the data as other data are. All three have
# the blur of that decoder. On images as small as these a mixture does for sixteen numbers what
# diffusion does. The GAN has no blur, and draws in one call. What a GAN cannot say is what a
# picture costs in bits ([notebook 12](12_latents.ipynb)).
#
# On MNIST after two CPU minutes each it is much the same (`benchmarks/generators.py`): mixture and
# diffusion at 1.6 and 1.7 floors, the GAN at 2.0, and it alone without blur.
#
# ## Why the prior does not fit
#
# The VAE's bound has $\mathrm{KL}(q(z\mid x)\,\|\,\mathcal N(0,I))$ for each $x$, and that makes
# the *mean* over $x$ of $q(z\mid x)$ look like $\mathcal N(0,I)$, but only roughly. In the two
# directions in which the codes vary most:

# %%
codec = vae.codec
with torch.no_grad():
    codes = codec.draw(train.x, sg.Streams(0))
    prior = torch.randn(len(codes), *codec.latent, generator=torch.Generator().manual_seed(0))
covariance = codes.T.cov().double()
values, vectors = torch.linalg.eigh(covariance)
plane = vectors[:, -2:].float()
between = float(torch.stack([codes[train.y == k].mean(0) for k in range(10)]).var(0).sum())
print(
    f"variances {float(values.min()):.2f} to {float(values.max()):.2f}; of the means of classes,"
    f" summed: {between:.1f}"
)
assert values.min() < 0.5  # directions that the prior is too wide in

# %% tags=["hide-input"] jupyter={"source_hidden": true}
figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=120)
a, b, c = figure.subplots(1, 3)
for ax, z, title in ((a, codes, "codes of the data"), (b, prior, "the prior")):
    ax.scatter(*(z @ plane).T, c=train.y if ax is a else torch.zeros(len(z)), cmap="tab10", s=4)
    ax.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal")
c.bar(range(len(values)), values.sort(descending=True).values, color=BLUE)
c.axhline(1, color=RED, label="prior")
c.set(title="variance of the codes, by direction", ylim=(0, None))
c.legend(frameon=False)
figure

# %% [markdown]
# The prior is round, of variance 1 in every direction. The codes are narrower, each digit has a
# place of its own, and where no codes are the decoder was never told what to do. A mixture or a
# diffusion model is told where they are. Neither makes the decoder sharper: that is the row
# *rebuilt*.
#
# ## Exercises
#
# **1.** *The perfect model.* A colleague's generator has the Fréchet distance of the training
# images themselves, the right frequencies, full accuracy. Its code is below. Which number tells?


# %%
def colleague(n):
    """Samples and labels."""
    pick = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(1))[:n]
    return train.x[pick], train.y[pick]


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
frechet, right, cover, sharp, near = grade(*colleague(500))
print(f"Fréchet / floor {frechet / floor:.2f}, accuracy {right:.2f}, coverage {cover:.2f},")
print(f"sharpness {sharp:.2f}, nearest {near:.2f}")
print(
    "It copies. Real images are",
    f"{grades['test images'][4]:.2f} from the nearest training image.",
)
assert near == 0 < grades["test images"][4]
assert frechet < floor

# %% [markdown]
# **2.** *A class too few.* Take the test images without the digit 8. By how much does each number
# change? Do the same with a slight blur, each pixel averaged with its right neighbour.

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
kept = test.y != 8
blurred = 0.5 * (test.x + test.x.roll(-1, 3))
for name, (x, y) in {
    "all": test,
    "no 8": (test.x[kept], test.y[kept]),
    "blurred": (blurred, test.y),
}.items():
    frechet, right, cover, sharp, near = grades[name] = grade(x, y)
    print(
        f"{name:8} Fréchet / floor {frechet / floor:5.2f}, accuracy {right:.2f},"
        f" coverage {cover:.2f},"
        f" sharpness {sharp:.2f}"
    )
print(
    "Coverage falls by the tenth that is missing, sharpness does not move; blur is the other way."
)
assert abs(grades["all"][2] - grades["no 8"][2] - 0.1) < 0.03
assert abs(grades["no 8"][3] / grades["all"][3] - 1) < 0.1
assert grades["blurred"][3] < 0.8 * grades["all"][3]

# %% [markdown]
# **3.** *The other KL.* Fit the normal law to the two modes by the least $\mathrm{KL}(q\,\|\,p)$,
# which asks whether what is drawn is likely. What does it choose?

# %% tags=["hide-cell"] jupyter={"source_hidden": true}
p = two_modes(line)
value, m, s = min((kl(normal(line, m, s), p), m, s) for m in means.tolist() for s in stds.tolist())
print(
    f"mean {m:.2f}, deviation {s:.2f}, KL {value:.3f};"
    f" -log of the weight of the mode: {-math.log(0.6):.3f}"
)
print("One mode, exactly. All it pays is the logarithm of the mass that it leaves out.")
assert abs(m - PLACES[0]) < 0.1
assert abs(s - WIDTH) < 0.1
assert abs(value + math.log(0.6)) < 0.02

# %% [markdown]
# ## What to remember
#
# - Likelihoods cover, games may leave out, and score matching at *one* noise level does not see
#   how much mass a mode has. At all levels it is a likelihood.
# - A VAE's codes are not its prior, and its pictures are means. The first can be mended.
# - A game's value says nothing once the players are unequal, and never what is missing.
# - No single number judges. Distance in features, coverage, sharpness and the nearest training
#   image each see what the others do not.
