"""Observation operators against numpy and scipy, and their adjoints against matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import F64, draw, slopes
from scipy.ndimage import convolve
from scipy.signal import convolve as full_convolve
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vjp, vmap

from sde_gen.inverse import (
    Blur,
    Callables,
    Downsample,
    Fourier,
    Mask,
    Matrix,
    Nonlinear,
    Observation,
    Operator,
    Radon,
    Stack,
    from_deepinv,
    from_linear_operator,
    joint,
)

RNG = np.random.default_rng(0)
IMAGE = (4, 6)
MASK = torch.from_numpy(RNG.random(IMAGE) < 0.5)
MATRIX = torch.from_numpy(RNG.normal(size=(5, 24)))
KERNEL = torch.from_numpy(RNG.random((3, 2)))
ANGLES = torch.linspace(0, 3, 7, dtype=F64)


class Reversal(nn.Module):
    """A linear physics as deepinv has it: A, A_adjoint and a buffer in single precision."""

    gain: Tensor

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("gain", torch.tensor(2.0))

    def A(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return self.gain * x.flip(-1)[..., 1:]

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.gain * torch.nn.functional.pad(y, (1, 0)).flip(-1)


def running_sum(x: Tensor) -> Tensor:
    """An operator that torch cannot see into."""
    return torch.from_numpy(np.cumsum(x.numpy(), axis=1))


def running_sum_back(y: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.cumsum(y.numpy()[:, ::-1], axis=1)[:, ::-1]))


OPERATORS: dict[str, Operator] = {
    "matrix": Matrix(MATRIX, IMAGE),
    "mask": Mask(MASK),
    "downsample": Downsample(2, IMAGE),
    "downsample-each": Downsample((2, 3), (2, *IMAGE)),
    "blur": Blur(KERNEL, IMAGE),
    "blur-zero": Blur(KERNEL, (2, *IMAGE), "zero"),
    "fourier": Fourier(MASK),
    "fourier-colour": Fourier(MASK, (2, *IMAGE)),
    "radon": Radon(ANGLES, IMAGE),
    "radon-narrow": Radon(ANGLES, (2, *IMAGE), detectors=4),
    "callables": Callables(running_sum, running_sum_back, IMAGE, device="cpu"),
    "scipy": from_linear_operator(aslinearoperator(MATRIX.numpy()), IMAGE),
    "deepinv": from_deepinv(Reversal(), (1, *IMAGE)),
    "composed": Downsample(2, IMAGE) @ Blur(KERNEL, IMAGE),
    "stack": Stack([Radon(ANGLES, IMAGE), Fourier(MASK), Mask(MASK)]),
}
EACH = pytest.mark.parametrize("name", OPERATORS)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- what each of them is ----


@EACH
def test_the_adjoint_is_the_transposed_matrix(name: str) -> None:
    a = OPERATORS[name]
    m, n = math.prod(a.measured), math.prod(a.shape)
    dense = a.dense()
    assert dense.shape == (m, n)
    assert dense.dtype == F64
    back = a.adjoint(torch.eye(m, dtype=F64).reshape(m, *a.measured)).reshape(m, n)
    rounding = 1e-6 if name == "deepinv" else 1e-13
    assert relative(back, dense) < rounding
    a.check_adjoint()
    x = draw(3, *a.shape)
    assert relative(a.forward(x).flatten(1), x.flatten(1) @ dense.T) < rounding


@EACH
def test_dtype_is_kept_and_rows_do_not_meet(name: str) -> None:
    a = OPERATORS[name]
    x, y = draw(3, *a.shape, dtype=torch.float32), draw(3, *a.measured, dtype=torch.float32)
    for f, z in ((a.forward, x), (a.adjoint, y)):
        out = f(z)
        assert out.dtype == torch.float32
        assert relative(f(z[1:2]), out[1:2]) < 1e-6
        assert relative(out.double(), f(z.double())) < 1e-5


@EACH
@pytest.mark.gpu
def test_the_device_is_that_of_the_state(name: str) -> None:
    a = OPERATORS[name]
    x, y = draw(3, *a.shape), draw(3, *a.measured)
    for f, z in ((a.forward, x), (a.adjoint, y)):
        out = f(z.cuda())
        assert out.is_cuda
        assert relative(out.cpu(), f(z)) < 1e-6
    o = Observation(a, y, 0.3)
    assert torch.allclose(o.log_likelihood(x.cuda()).cpu(), o.log_likelihood(x), rtol=1e-6)


@EACH
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_every_derivative_is_the_matrix(name: str) -> None:
    # The first use in a precision is inside a transform: what is cached must outlive it.
    a = OPERATORS[name]
    x, v = draw(2, *a.shape, dtype=torch.float32), draw(2, *a.measured, dtype=torch.float32)
    pulled = vjp(a.forward, x)[1](v)[0]
    assert relative(pulled, a.adjoint(v)) < 1e-6
    dense = a.dense().float()

    def one(x: Tensor) -> Tensor:
        return a.forward(x.unsqueeze(0)).flatten()

    for jacobian in (jacrev, jacfwd):
        assert relative(jacobian(one)(x[0]).flatten(1), dense) < 1e-5
    curvature = torch.autograd.functional.hessian(lambda x: one(x).square().sum() / 2, x[0])
    n = dense.shape[1]
    assert relative(curvature.reshape(n, n), dense.T @ dense) < 1e-5
    both = torch.stack([x, 2 * x], 1)
    assert relative(vmap(a.forward, in_dims=1)(both)[1], a.forward(2 * x)) < 1e-6


def test_mask_takes_what_was_observed() -> None:
    a, x = OPERATORS["mask"], draw(3, *IMAGE)
    y = a.forward(x)
    assert torch.equal(y, x[:, MASK])
    assert torch.equal(a.adjoint(y), torch.where(MASK, x, 0.0))


def test_downsample_takes_means_of_blocks() -> None:
    x = draw(3, 2, *IMAGE)
    wanted = np.array(
        [
            [
                [[image[i : i + 2, j : j + 3].mean() for j in (0, 3)] for i in (0, 2)]
                for image in colours
            ]
            for colours in x.numpy()
        ]
    )
    assert np.allclose(OPERATORS["downsample-each"].forward(x), wanted, rtol=0, atol=1e-15)
    assert Downsample(3, (6,)).measured == (2,)
    assert Downsample((3,), (5, 6)).measured == (5, 2)


@pytest.mark.parametrize("size", [(3, 3), (3, 2), (4, 5), (1, 6)])
def test_blur_is_a_convolution(size: tuple[int, int]) -> None:
    kernel, x = draw(*size, seed=1), draw(2, *IMAGE)
    wrapped = Blur(kernel, IMAGE).forward(x).numpy()
    zero = Blur(kernel, IMAGE, "zero").forward(x).numpy()
    h, w = size
    for image, a, b in zip(x.numpy(), wrapped, zero, strict=True):
        full = full_convolve(image, kernel.numpy(), mode="full", method="direct")
        wanted = full[h // 2 : h // 2 + 4, w // 2 : w // 2 + 6]
        assert np.allclose(b, wanted, rtol=0, atol=1e-13)
        assert np.allclose(a, convolve(image, kernel.numpy(), mode="wrap"), rtol=0, atol=1e-13)


def test_a_kernel_may_be_larger_than_a_padded_signal() -> None:
    kernel, x = draw(9, seed=1), draw(1, 5)
    full = np.convolve(x[0].numpy(), kernel.numpy())
    assert np.allclose(Blur(kernel, (5,), "zero").forward(x)[0], full[4:9], rtol=0, atol=1e-13)


def test_fourier_is_the_orthonormal_transform() -> None:
    x = draw(3, 2, *IMAGE)
    wanted = np.fft.fft2(x.numpy(), norm="ortho")[..., MASK.numpy()]
    y = OPERATORS["fourier-colour"].forward(x)
    assert y.shape == (3, 2, int(MASK.sum()), 2)
    assert np.allclose(torch.view_as_complex(y), wanted, rtol=0, atol=1e-14)
    every = Fourier(torch.ones(IMAGE, dtype=torch.bool))
    assert torch.allclose(every.adjoint(every.forward(x[:, 0])), x[:, 0], rtol=0, atol=1e-14)


def test_matrix_and_stack_and_composition_are_those_of_numpy() -> None:
    x = draw(3, *IMAGE)
    flat = x.flatten(1).numpy()
    assert np.allclose(OPERATORS["matrix"].forward(x), flat @ MATRIX.numpy().T, atol=1e-13)
    parts = [Radon(ANGLES, IMAGE), Fourier(MASK), Mask(MASK)]
    wanted = np.concatenate([a.dense().numpy() for a in parts])
    assert np.array_equal(OPERATORS["stack"].dense(), wanted)
    wanted = Downsample(2, IMAGE).dense() @ Blur(KERNEL, IMAGE).dense()
    assert torch.allclose(OPERATORS["composed"].dense(), wanted, rtol=0, atol=1e-14)


# ---- rays ----


def test_a_pixel_casts_its_shadow() -> None:
    # Each pixel as n x n points, counted in the bins: an error of at most the points next to the
    # two edges of a bin, fewer than 2 sqrt(2) n of n^2.
    n, size = 400, (3, 4)
    a = Radon(ANGLES, size)
    k = a.measured[1]
    step = (np.arange(n) + 0.5) / n - 0.5
    for i, theta in enumerate(ANGLES.tolist()):
        for row in range(size[0]):
            for column in range(size[1]):
                u = column - (size[1] - 1) / 2 + step
                v = (size[0] - 1) / 2 - row + step[:, None]
                s = u * math.cos(theta) + v * math.sin(theta)
                counts, _ = np.histogram(s, bins=k, range=(-k / 2, k / 2))
                x = torch.zeros(1, *size, dtype=F64)
                x[0, row, column] = 1.0
                assert (
                    np.abs(a.forward(x)[0, i].numpy() - counts / n**2).max() < 2 * math.sqrt(2) / n
                )


def test_every_angle_keeps_the_total_and_pixels_stand_upright() -> None:
    x = draw(2, 5, 8).abs()
    angles = torch.tensor([0, 1e-9, 0.3, math.pi / 4, math.pi / 2, 2.0, math.pi], dtype=F64)
    y = Radon(angles, (5, 8)).forward(x)
    assert torch.allclose(y.sum(-1), x.sum((-2, -1)).unsqueeze(1), rtol=1e-13)
    assert torch.allclose(y[:, 0], y[:, 1], atol=1e-7)
    assert torch.allclose(y[:, 0], y[:, 6].flip(-1), atol=1e-13)
    # At 0 the columns are summed, from left to right; at pi / 2 the rows, from below.
    assert torch.allclose(y[:, 0, 1:9], x.sum(1), atol=1e-13)
    rows = Radon(angles[4:5], (5, 8), detectors=5).forward(x)[:, 0]
    assert torch.allclose(rows, x.sum(2).flip(-1), atol=1e-13)


def projections(
    function: Callable[[Tensor, Tensor], Tensor], size: int, angles: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Line integrals over [-1, 1]^2 of a function of (u, v) at size^2 pixels, and the bins."""
    h = 2 / size
    grid = (torch.arange(size, dtype=F64) - (size - 1) / 2) * h
    image = function(grid, -grid.unsqueeze(1))
    y = h * Radon(angles, (size, size)).forward(image.unsqueeze(0))[0]
    k = y.shape[-1]
    return y, (torch.arange(k, dtype=F64) - (k - 1) / 2) * h, h


def test_projections_of_a_gaussian_converge() -> None:
    # Away from the axes: along them whole columns of pixels share an edge, and the error, though
    # no larger, comes and goes.
    width, u0, v0 = 0.12, 0.2, 0.35
    angles, errors = torch.tensor([0.4, 0.8, 2.2, 3.0], dtype=F64), []
    for size in (32, 64, 128):
        y, s, h = projections(
            lambda u, v: torch.exp(-((u - u0) ** 2 + (v - v0) ** 2) / (2 * width**2)), size, angles
        )
        centre = (u0 * angles.cos() + v0 * angles.sin()).unsqueeze(1)
        edges = [torch.special.ndtr((s + d * h / 2 - centre) / width) for d in (1, -1)]
        exact = 2 * math.pi * width**2 * (edges[0] - edges[1]) / h
        errors.append(float((y - exact).abs().max()))
    assert min(slopes(errors)) > 1.8
    assert errors[-1] < 3e-4


def test_projections_of_a_disc_converge() -> None:
    radius, errors = 0.7, []

    def area(s: Tensor) -> Tensor:
        s = (s / radius).clamp(-1, 1)
        return radius**2 * (s * (1 - s**2).sqrt() + s.asin())

    for size in (16, 64, 256):
        y, s, h = projections(lambda u, v: (u**2 + v**2 < radius**2).to(F64), size, ANGLES[1:3])
        exact = (area(s + h / 2) - area(s - h / 2)) / h
        errors.append(float((y - exact).abs().mean()))
    # The edge of the disc is drawn in whole pixels: at least order 1, a factor 4 each time.
    assert min(slopes(errors)) > 1.8
    assert errors[-1] < 2e-3


# ---- functions ----


def test_nonlinear_linearizes() -> None:
    a = Nonlinear(lambda x: torch.sin(x).cumsum(1) * x[:, :1], (4,))
    assert a.measured == (4,)
    assert not a.linear
    x, u, v = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    y, jvp, pull = a.linearize(x)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(a.forward, row.unsqueeze(0))[0, :, 0] for row in x]
    )
    assert torch.equal(y, a.forward(x))
    assert torch.allclose(jvp(u), torch.linalg.vecdot(jacobian, u.unsqueeze(1)), atol=1e-13)
    assert torch.allclose(pull(v), torch.linalg.vecdot(jacobian.mT, v.unsqueeze(1)), atol=1e-13)
    a.check_adjoint()
    with torch.no_grad():
        assert torch.equal(a.linearize(x).vjp(v), pull(v))


def test_nonlinear_parts_compose_and_stack() -> None:
    square = Nonlinear(torch.square, IMAGE)
    after = Downsample(2, IMAGE) @ square @ Blur(KERNEL, IMAGE)
    assert not after.linear
    both = Stack([after, Mask(MASK)])
    assert not both.linear
    x, u, v = draw(2, *IMAGE), draw(2, *IMAGE, seed=1), draw(2, *both.measured, seed=2)
    down, blur = Downsample(2, IMAGE), Blur(KERNEL, IMAGE)
    y, jvp, pull = both.linearize(x)
    assert torch.allclose(y[:, :6], down.forward(blur.forward(x) ** 2).flatten(1))
    slope = down.forward(2 * blur.forward(x) * blur.forward(u))
    assert torch.allclose(jvp(u), torch.cat([slope.flatten(1), u[:, MASK]], 1))
    assert torch.allclose(pull(v), vjp(both.forward, x)[1](v)[0])
    both.check_adjoint()


def test_functions_compute_where_they_say() -> None:
    seen = []

    def double(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return 2 * x

    a = Callables(double, double, (3,), dtype=torch.float32)
    assert a.forward(torch.ones(1, 3, dtype=F64)).dtype == F64
    assert set(seen) == {torch.float32}
    a = Nonlinear(double, (3,), dtype=F64)
    seen.clear()
    assert a.forward(torch.ones(1, 3)).dtype == torch.float32
    assert seen == [F64]


def test_scipy_operators_of_every_make() -> None:
    plain = LinearOperator(
        (5, 24), matvec=lambda x: MATRIX.numpy() @ x, rmatvec=lambda y: MATRIX.numpy().T @ y
    )
    assert np.allclose(from_linear_operator(plain).dense(), MATRIX.numpy(), atol=1e-14)
    single = from_linear_operator(aslinearoperator(MATRIX.numpy().astype(np.float32)))
    assert single.dtype == torch.float32
    assert single.forward(draw(2, 24)).dtype == F64


def test_a_physics_without_adjoint_is_nonlinear() -> None:
    class Phase:
        def A(self, x: Tensor) -> Tensor:
            return x.square()

    a = from_deepinv(Phase(), (1, 4, 4))
    assert isinstance(a, Nonlinear)
    x = draw(2, 1, 4, 4)
    assert torch.allclose(a.linearize(x).vjp(torch.ones_like(x)), 2 * x)
    assert OPERATORS["deepinv"].dtype == torch.float32


# ---- what was observed ----


@pytest.mark.parametrize("kind", ["number", "entries", "rows", "matrix", "matrix of each"])
def test_likelihood_is_that_of_torch(kind: str) -> None:
    a, rows = Downsample(2, IMAGE), 3
    x, y = draw(rows, *IMAGE), draw(rows, 2, 3, seed=1)
    root = draw(rows, 6, 6, seed=2) / 4 + torch.eye(6, dtype=F64)
    std = draw(rows, 2, 3, seed=3).abs() + 0.1
    s = {
        "number": torch.eye(6, dtype=F64) * 0.3**2,
        "entries": torch.diag(std[0].flatten() ** 2),
        "rows": torch.diag_embed(std.flatten(1) ** 2),
        "matrix": root[0] @ root[0].T,
        "matrix of each": root @ root.mT,
    }[kind]
    noise: Any = {"number": 0.3, "entries": std[0], "rows": std}.get(kind)
    o = Observation(a, y, noise, covariance=None if noise is not None else s)
    law = torch.distributions.MultivariateNormal(a.forward(x).flatten(1), s)
    wanted = law.log_prob(y.flatten(1))
    assert torch.allclose(o.log_likelihood(x), wanted, rtol=1e-12)
    r = o.residual(x)
    assert torch.equal(r, y - a.forward(x))
    white = o.whiten(r)
    assert white.shape == r.shape
    assert torch.allclose(o.log_volume - white.flatten(1).square().sum(1) / -2, -wanted)
    solved = torch.linalg.solve(s.expand(rows, 6, 6), r.flatten(1))
    assert torch.allclose(o.precision(r).flatten(1), solved, rtol=1e-11)
    # Whatever there is a row of follows the rows; one row alone is that of all samples.
    some = torch.tensor([2, 0])
    assert torch.allclose(o.rows(some).log_likelihood(x[some]), wanted[some], rtol=1e-12)
    assert torch.allclose(o.rows(slice(1, 3)).log_likelihood(x[1:]), wanted[1:], rtol=1e-12)
    assert o.rows(1).batch is None
    assert torch.allclose(o.rows(1).log_likelihood(x)[1], wanted[1], rtol=1e-12)


@pytest.mark.parametrize("kind", ["number", "entries", "matrix"])
def test_a_single_row_is_that_of_all_samples(kind: str) -> None:
    a, x, y = Downsample(2, IMAGE), draw(3, *IMAGE), draw(1, 2, 3, seed=1)
    noise = {"number": 0.3, "entries": draw(1, 2, 3).abs()}.get(kind)
    s = torch.diag(torch.arange(1.0, 7.0)).unsqueeze(0) if kind == "matrix" else None
    row = Observation(a, y, noise, covariance=s)
    if isinstance(noise, Tensor):
        noise = noise[0]
    shared = Observation(a, y[0], noise, covariance=None if s is None else s[0])
    assert row.batch is None
    assert torch.equal(row.log_likelihood(x), shared.log_likelihood(x))


def test_the_likelihood_is_that_of_float64_and_has_a_gradient() -> None:
    a = Downsample(2, IMAGE)
    o = Observation(a, draw(2, 3, dtype=torch.float32), 0.1)
    x = draw(3, *IMAGE, dtype=torch.float32).requires_grad_()
    value = o.log_likelihood(x)
    assert value.dtype == F64
    assert o.residual(x).dtype == torch.float32
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert relative(gradient, a.adjoint(o.precision(o.residual(x.detach())))) < 1e-5


def test_joint_multiplies_likelihoods() -> None:
    x = draw(3, *IMAGE)
    root = draw(4, 4, seed=5) + 2 * torch.eye(4, dtype=F64)
    one = Observation(Downsample(2, IMAGE), draw(2, 3, seed=1), 0.2)
    each = Observation(
        Mask(MASK), draw(3, int(MASK.sum()), seed=2), draw(3, int(MASK.sum())).abs()
    )
    curved = Observation(Nonlinear(torch.square, IMAGE), draw(*IMAGE, seed=3), 0.5)
    linked = Observation(Downsample((2, 3), IMAGE), draw(2, 2, seed=4), covariance=root @ root.T)
    for parts in ([one, curved], [one, each, curved], [linked, one], [each, linked]):
        whole = joint(parts)
        wanted = torch.stack([o.log_likelihood(x) for o in parts]).sum(0)
        assert torch.allclose(whole.log_likelihood(x), wanted, rtol=1e-12)
        assert whole.batch == (3 if each in parts else None)
        index = torch.tensor([2, 1])
        assert torch.allclose(whole.rows(index).log_likelihood(x[index]), wanted[index])
    assert joint(one) is one
    assert joint([one]) is one


def test_what_is_printed_says_the_units() -> None:
    o = Observation(Mask(MASK), torch.full((int(MASK.sum()),), 2.0), 0.25)
    m = int(MASK.sum())
    assert repr(o) == (
        f"Observation(Mask((4, 6) -> ({m},)), y ({m},) for all samples, rms 2; noise std 0.25 in"
        " the units of y)"
    )
    several = Observation(Mask(MASK), torch.ones(5, m), torch.linspace(0.1, 0.3, m))
    assert "for 5 samples" in repr(several)
    assert "noise std 0.1 .. 0.3 in the units of y" in repr(several)
    linked = Observation(Matrix(MATRIX, IMAGE), torch.ones(5), covariance=4 * torch.eye(5))
    assert "noise correlated, std 2 in the units of y" in repr(linked)


def test_noise_of_fourier_parts_is_as_documented() -> None:
    # 4,000 draws: the standard error of a standard deviation is s / sqrt(8000), five of which are
    # 6 %.
    a = Fourier(torch.ones(4, 4, dtype=torch.bool))
    spread = a.forward(draw(4000, 4, 4)).std(0)
    own = torch.tensor([0, 2, 8, 10])  # the frequencies that are their own negatives
    others = torch.tensor([i for i in range(16) if i not in own])
    assert (spread[own, 0] - 1).abs().max() < 0.06
    assert spread[own, 1].max() < 1e-12
    assert (spread[others] * math.sqrt(2) - 1).abs().max() < 0.06


# ---- what cannot work ----


def half_adjoint(y: Tensor) -> Tensor:
    return running_sum_back(y) / 2


def no_adjoint(y: Tensor) -> Tensor:
    return running_sum(y)


class NoTranspose(LinearOperator):
    def __init__(self) -> None:
        super().__init__(np.float64, (5, 24))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return MATRIX.numpy() @ x


ADJOINTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: Callables(running_sum, half_adjoint, IMAGE),
        ValueError,
        r"Callables\(\(4, 6\) -> \(4, 6\)\): the adjoint is not that of forward: <A u, v> ="
        r" \(\S+, \S+, [^ )]+\) but <u, A\^T v> = \(\S+, \S+, [^ )]+\) for .*0.5 times",
    ),
    (lambda: Callables(running_sum, no_adjoint, IMAGE), ValueError, "relative difference"),
    (lambda: Callables(lambda x: x + 1, lambda y: y, IMAGE), ValueError, "forward is not linear"),
    (lambda: Callables(torch.relu, lambda y: y, IMAGE), ValueError, "forward is not linear"),
    (
        lambda: Callables(lambda x: x.float().double() * 3, lambda y: y * 3, IMAGE),
        ValueError,
        "dtype=torch.float32",
    ),
    (
        lambda: Callables(lambda x: x, lambda y: y[:, :2], IMAGE),
        ValueError,
        r"adjoint returned shape \(3, 2, 6\), expected \(3, 4, 6\)",
    ),
    (lambda: Callables(torch.sum, lambda y: y, IMAGE), ValueError, r"\(B, 4, 6\).*returned \(\)"),
    (lambda: Callables(lambda x: x[0], lambda y: y, IMAGE), ValueError, "must take a batch"),
    (lambda: Callables(torch.fft.fft, torch.fft.ifft, IMAGE), TypeError, "real pairs"),
    (lambda: Nonlinear(lambda x: [x], IMAGE), TypeError, "one real.*tensor, got list"),
    (
        lambda: Nonlinear(torch.square, IMAGE, (3,)).forward(torch.ones(2, *IMAGE)),
        ValueError,
        r"f returned shape \(2, 4, 6\), expected \(2, 3\)",
    ),
    (lambda: Nonlinear(torch.square, (3,)).adjoint(torch.ones(1, 3)), TypeError, "linearize"),
    (lambda: Nonlinear(torch.square, (3,)).dense(), TypeError, "no matrix"),
    (lambda: from_deepinv(Reversal(1.1), (1, *IMAGE)), ValueError, "1.1 times the true one"),
    (lambda: from_deepinv(object(), (1, *IMAGE)), TypeError, "method A, object has none"),
    (lambda: from_linear_operator(NoTranspose()), TypeError, "rmatvec"),
    (lambda: from_linear_operator(MATRIX), TypeError, "lacks matmat, rmatmat: .*aslinearop"),
    (lambda: from_linear_operator(aslinearoperator(np.eye(3)), (2, 2)), ValueError, "3 columns"),
    (lambda: from_linear_operator(aslinearoperator(1j * np.eye(3))), TypeError, "complex128"),
]


@pytest.mark.parametrize(("make", "error", "message"), ADJOINTS)
def test_a_function_that_does_not_fit_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_planted_adjoint_is_found_on_request() -> None:
    class Shifted(Blur):
        def _adjoint(self, y: Tensor) -> Tensor:
            return super()._forward(y)

    with pytest.raises(ValueError, match="the adjoint is not that of forward"):
        Shifted(KERNEL, IMAGE).check_adjoint()
    Shifted(torch.ones(3, 3), IMAGE).check_adjoint()  # a symmetric kernel is its own adjoint
    Callables(running_sum, no_adjoint, IMAGE, check=False)


ARGUMENTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Matrix(torch.ones(3)), ValueError, r"matrix must be \(m, n\), got \(3,\)"),
    (lambda: Matrix(torch.ones(2, 3), (2, 2)), ValueError, "3 columns.* has 4 entries"),
    (lambda: Matrix(torch.tensor([[math.nan]])), ValueError, "matrix has 1 NaN"),
    (lambda: Matrix(torch.ones(2, 3, dtype=torch.int64)), TypeError, "matrix must be real"),
    (lambda: Matrix(np.eye(3)), TypeError, "matrix must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: Mask(torch.ones(3)), TypeError, "mask must be boolean"),
    (lambda: Mask(torch.zeros(3, dtype=torch.bool)), ValueError, "observes nothing"),
    (lambda: Downsample(3, (4, 6)), ValueError, r"factor 3 does not divide.* \(4, 6\)"),
    (lambda: Downsample((2, 2, 2), (4, 6)), ValueError, r"factor \(2, 2, 2\)"),
    (lambda: Downsample(0, (4, 6)), ValueError, "factor must be positive"),
    (lambda: Downsample(2, 4), TypeError, "shape must be a tuple"),  # type: ignore[arg-type]
    (lambda: Blur(torch.ones(2, 2, 2), IMAGE), ValueError, "an axis for each of the last axes"),
    (lambda: Blur(torch.ones(5, 5), IMAGE), ValueError, r"\(5, 5\) is larger than \(4, 6\)"),
    (lambda: Blur(KERNEL, IMAGE, "same"), ValueError, "padding must be one of"),  # type: ignore[arg-type]
    (lambda: Blur(torch.ones(0), IMAGE), ValueError, "kernel is empty"),
    (lambda: Fourier(MASK, (6, 4)), ValueError, r"mask \(4, 6\) must have the last axes"),
    (lambda: Radon(torch.tensor([0.0, 45.0]), IMAGE), ValueError, "radians.*deg2rad"),
    (lambda: Radon(ANGLES, (4,)), ValueError, "must end in an image"),
    (lambda: Radon(ANGLES.unsqueeze(0), IMAGE), ValueError, r"angles must be \(A,\)"),
    (lambda: Radon(ANGLES, IMAGE, detectors=0), ValueError, "detectors must be positive"),
    (lambda: Mask(MASK) @ Downsample(2, IMAGE), ValueError, r"takes \(4, 6\), .* gives \(2, 3\)"),
    (lambda: Mask(MASK) @ MATRIX, TypeError, "unsupported operand"),  # type: ignore[operator]
    (lambda: Stack([]), ValueError, "a stack needs operators of one x"),
    (lambda: Stack([Mask(MASK), Downsample(2, (4, 4))]), ValueError, "operators of one x"),
    (lambda: Downsample(2, (200, 200)).dense(), ValueError, "10000 x 40000 entries"),
]


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENTS)
def test_an_argument_that_cannot_be_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@EACH
def test_states_of_the_wrong_shape_are_refused(name: str) -> None:
    a = OPERATORS[name]
    with pytest.raises(ValueError, match=r"needs x .*got"):
        a.forward(torch.ones(a.shape))
    with pytest.raises(ValueError, match=r"needs y .*got"):
        a.adjoint(torch.ones(2, *a.measured, 1))
    with pytest.raises(TypeError, match="y must be floating point"):
        a.adjoint(torch.ones(2, *a.measured, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        a.forward(np.ones((2, *a.shape)))  # type: ignore[arg-type]


Y = torch.zeros(2, 3)
DOWN = Downsample(2, IMAGE)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Observation(MATRIX, Y, 0.1), TypeError, "operator must be an Operator, got Tensor"),  # type: ignore[arg-type]
    (lambda: Observation(DOWN, Y.numpy(), 0.1), TypeError, "y must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: Observation(DOWN, Y.long(), 0.1), TypeError, "y must be floating point"),
    (lambda: Observation(DOWN, Y.T, 0.1), ValueError, r"y must be .*\(2, 3\).*got \(3, 2\)"),
    (lambda: Observation(DOWN, Y / 0, 0.1), ValueError, "y has 6 NaN"),
    (lambda: Observation(DOWN, Y, 0.0), ValueError, "noise must be positive.*got 0"),
    (lambda: Observation(DOWN, Y, -1.0), ValueError, "noise must be positive.*got -1"),
    (lambda: Observation(DOWN, Y, math.nan), ValueError, "noise has 1 NaN"),
    (lambda: Observation(DOWN, Y, torch.ones(3)), ValueError, r"noise must be.*got \(3,\)"),
    (lambda: Observation(DOWN, Y, torch.eye(6)), ValueError, "goes to covariance="),
    (lambda: Observation(DOWN, Y), ValueError, "needs its noise"),
    (lambda: Observation(DOWN, Y, 0.1, covariance=torch.eye(6)), ValueError, "not both"),
    (lambda: Observation(DOWN, Y, covariance=torch.eye(5)), ValueError, r"must be \(6, 6\)"),
    (lambda: Observation(DOWN, Y, covariance=torch.ones(6, 6)), ValueError, "positive definite"),
    (
        lambda: Observation(DOWN, Y, covariance=torch.eye(6).roll(1, 0)),
        ValueError,
        "covariance must be symmetric",
    ),
    (
        lambda: Observation(DOWN, Y.expand(5, 2, 3), 0.1).residual(torch.zeros(4, *IMAGE)),
        ValueError,
        "a row for each of 5 samples, x has 4",
    ),
    (lambda: joint([]), TypeError, "one Observation or a list of them"),
    (lambda: joint([DOWN]), TypeError, "one Observation or a list of them"),  # type: ignore[list-item]
    (
        lambda: joint([Observation(DOWN, Y.expand(n, 2, 3), 0.1) for n in (2, 3)]),
        ValueError,
        "have rows for",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_an_observation_that_cannot_be_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_full_circle_of_angles_sees_opposite_sides_alike() -> None:
    # A projection from the other side is the same one, read backwards; pi and 2 pi are angles.
    a = Radon(torch.tensor([0.0, math.pi, 2 * math.pi], dtype=F64), (4, 5))
    y = a.forward(draw(2, 4, 5))
    torch.testing.assert_close(y[:, 1], y[:, 0].flip(-1))
    torch.testing.assert_close(y[:, 2], y[:, 0])
    with pytest.raises(ValueError, match="radians"):
        Radon(torch.tensor([0.0, 2 * math.pi + 0.01]), (4, 5))
