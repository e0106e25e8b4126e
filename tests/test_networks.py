"""Networks: the published size, any shape, one contract."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sde_gen.networks import MLP, Network, UNet
from sde_gen.networks.blocks import (
    Attention,
    Block,
    Enlarge,
    Space,
    cut,
    group_norm,
    joined,
)
from sde_gen.networks.embeddings import WAVES, Embedding, Fourier, Sinusoidal

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
NETWORKS = {
    "mlp": lambda: MLP((3, 2), width=16, depth=2, classes=4),
    "unet 1-d": lambda: UNet((2, 9), **SMALL, classes=4, attention=(5,)),
    "unet 2-d": lambda: UNet((1, 7, 5), **SMALL, classes=4, heads=2, embedding="fourier"),
    "unet in patches": lambda: UNet((1, 6, 8), **SMALL, classes=4, patch=2),
    "unet 3-d": lambda: UNet((1, 3, 4, 5), **SMALL, classes=4, scale_shift=False),
}


def awake(net: Network) -> Network:
    """The network with random weights where it starts at zero, in evaluation."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if not p.any():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return net.eval()


def batch(net: Network, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, *net.shape, generator=generator)
    return x, torch.linspace(-2, 1, n), torch.arange(n) % 4


@pytest.fixture(params=NETWORKS)
def net(request) -> Network:
    return awake(NETWORKS[request.param]())


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def ddpm_parameters() -> int:
    """The CIFAR-10 network of Ho et al. 2020, appendix B, added up by hand."""

    def conv(a: int, b: int, k: int = 3) -> int:
        return k * k * a * b + b

    def block(a: int, b: int) -> int:
        skip = conv(a, b, 1) if a != b else 0
        return 2 * a + conv(a, b) + (512 * b + b) + 2 * b + conv(b, b) + skip

    attention = 2 * 256 + 4 * conv(256, 256, 1)
    time = (128 * 512 + 512) + (512 * 512 + 512)
    down = 2 * block(128, 128) + conv(128, 128)
    down += block(128, 256) + block(256, 256) + 2 * attention + conv(256, 256)
    down += 2 * block(256, 256) + conv(256, 256)
    down += 2 * block(256, 256)
    middle = 2 * block(256, 256) + attention
    up = 3 * block(512, 256) + conv(256, 256)
    up += 3 * block(512, 256) + conv(256, 256)
    up += 2 * block(512, 256) + block(384, 256) + 3 * attention + conv(256, 256)
    up += block(384, 128) + 2 * block(256, 128)
    return time + conv(3, 128) + down + middle + up + 2 * 128 + conv(128, 3)


def test_cifar10_is_the_published_network():
    net = UNet.cifar10()
    assert count(net) == ddpm_parameters()
    assert round(count(net) / 1e6, 1) == 35.7
    assert [m.norm.num_channels for m in net.modules() if isinstance(m, Attention)] == [256] * 6


def test_digits_is_small():
    net = UNet.digits()
    assert 150_000 < count(net) < 250_000
    assert (net.shape, net.classes) == ((1, 8, 8), 10)


def test_shape_and_start(net):
    x, c, y = batch(net)
    assert net(x, c, y).shape == x.shape
    fresh = type(net)(**net.config)
    assert (fresh(x, c, y) == 0).all()


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 1, 1), (2, 5), (1, 33, 16), (1, 2, 3, 1)])
@pytest.mark.parametrize("channels", [6, 37])
def test_any_size_and_any_number_of_channels(shape, channels):
    net = awake(UNet(shape, channels, (1, 2, 1), blocks=1))
    x = torch.randn(2, *shape)
    assert net(x, torch.tensor(0.3)).shape == x.shape


@pytest.mark.parametrize(("size", "side"), [((6,), 3), ((4, 6), 2), ((4, 2, 6), 2), ((3, 5), 1)])
def test_patches_are_channels(size, side):
    x = torch.arange(2 * 3 * math.prod(size), dtype=torch.float64).reshape(2, 3, *size)
    h = cut(x, side)
    assert h.shape == (2, 3 * side ** len(size), *(s // side for s in size))
    assert torch.equal(joined(h, side), x)
    if len(size) == 2:
        assert torch.equal(h, nn.functional.pixel_unshuffle(x, side))


def test_a_unet_in_patches_written_out():
    net = awake(UNet((1, 6, 8), 8, (1,), blocks=0, classes=4, patch=2))
    x, c, y = batch(net)
    e = net.project(nn.functional.silu(net.embedding(c, y))).split(net.splits, 1)
    fine = net.stem[0](net.input(x), e[0])
    h = coarse = nn.functional.pixel_unshuffle(fine, 2)
    assert h.shape == (3, 8, 3, 4)
    h = net.middle[1](net.middle[0](h, e[1]), e[2])
    h = net.up[0](torch.cat([h, coarse], 1), e[3])
    h = net.crown[0](torch.cat([nn.functional.pixel_shuffle(h, 2), fine], 1), e[4])
    assert torch.equal(net(x, c, y), net.output(nn.functional.silu(net.norm(h))))


@pytest.mark.parametrize(("shape", "channels"), [((1, 6, 7), 8), ((1, 6, 8), 6)])
def test_a_patch_divides_sizes_and_channels(shape, channels):
    with pytest.raises(ValueError, match=f"patch=2 must divide .* 2.2 the {channels} channels"):
        UNet(shape, channels, patch=2)


def test_config_rebuilds_it_through_json(net):
    twin = type(net)(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    inputs = batch(net)
    assert (twin.eval()(*inputs) == net(*inputs)).all()
    assert twin.config == net.config
    assert (twin.shape, twin.classes) == (net.shape, net.classes)


def test_config_holds_every_argument():
    arguments = {"shape": [1, 8], "channels": 4, "multipliers": [1, 3], "blocks": 0}
    arguments |= {"attention": [4], "heads": 2, "dropout": 0.25, "classes": 3, "width": 12}
    arguments |= {"embedding": "fourier", "scale_shift": False, "head": True}
    arguments |= {"context": {"a": [3], "b": [None, 2]}, "gates": True, "periodic": True}
    arguments |= {"patch": 2, "recompute": True}
    assert UNet(**arguments).config == arguments
    arguments = {"shape": [2], "width": 4, "depth": 1, "classes": 3, "dropout": 0.25}
    arguments |= {"embedding": "fourier", "outputs": 5, "head": False, "context": {"a": [3]}}
    assert MLP(**arguments).config == arguments


def test_a_sample_does_not_depend_on_its_batch(net):
    x, c, y = batch(net)
    whole = net(x, c, y)
    for i in range(len(x)):
        torch.testing.assert_close(net(x[[i]], c[[i]], y[[i]])[0], whole[i])
        torch.testing.assert_close(net(x, c[i], y)[i], whole[i])


def test_labels_and_levels_matter_and_minus_one_is_no_label(net):
    x, c, y = batch(net)
    one = x[:1].expand(5, *net.shape)
    assert net(one, c[0], torch.arange(-1, 4)).unique(dim=0).shape == one.shape
    assert (net(x, c, y) != net(x, c + 0.1, y)).any()
    torch.testing.assert_close(net(x, c, torch.full_like(y, -1)), net(x, c))
    mixed = net(x, c, torch.tensor([0, -1, 2]))
    torch.testing.assert_close(mixed[1], net(x, c)[1])
    torch.testing.assert_close(mixed[2], net(x, c, y)[2])


def test_labels_are_integers_however_they_are_held(net, monkeypatch):
    x, c, _ = batch(net)
    expected = net(x, c, torch.tensor([2, 0, 3]))
    for y in (
        [2, 0, 3],
        (2, 0, 3),
        np.array([2, 0, 3], dtype=np.int16),
        torch.tensor([2, 0, 3]).int(),
    ):
        torch.testing.assert_close(net(x, c, y), expected, rtol=0, atol=0)
    for one in (3, np.int64(3), torch.tensor(3)):
        torch.testing.assert_close(net(x, c, one), net(x, c, [3, 3, 3]), rtol=0, atol=0)
    for wrong in (True, [1.0, 2.0, 0.0], "a", [0, [1]]):
        with pytest.raises(TypeError, match="labels must be integers"):
            net(x, c, wrong)
    # A network of one's own sees a label for each sample.
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(net, "compute", lambda x, c, y: seen.append(y) or x)
    for y in (3, np.int64(3), [3, 3, 3]):
        net(x, c, y)
    assert [y.tolist() for y in seen] == 3 * [[3, 3, 3]]


def test_every_parameter_learns(net):
    x, c, y = batch(net, 4)
    (net(x, c, y).square().sum() + net(x, c).square().sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
        if p.ndim > 1:
            assert p.grad.flatten(1).any(1).all(), name


def test_dtypes(net):
    x, c, y = batch(net)
    single = net(x, c, y)
    assert net(x.double(), c.double(), y).dtype == torch.float64
    assert net(x, torch.tensor(0.3, dtype=torch.float64), y).dtype == torch.float32
    double = net.double()(x.double(), c.double(), y)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_half_precision(net):
    x, c, y = batch(net)
    single = net(x, c, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(x, c, y)
    assert mixed.dtype == torch.float32
    error = (mixed - single).norm() / single.norm()
    assert 0 < error < 16 * torch.finfo(torch.bfloat16).eps


def test_channels_last():
    net = awake(UNet((2, 8, 8), **SMALL))
    x, c, _ = batch(net)
    expected = net(x, c)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, c), expected)


def test_vjp_and_vmap(net):
    x, c, y = batch(net)
    expected, pull = torch.func.vjp(lambda x: net(x, c, y), x)
    torch.testing.assert_close(expected, net(x, c, y))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, c, y).square().sum() / 2, x)
    torch.testing.assert_close(pull(expected)[0], gradient)
    x = x.detach()
    mapped = torch.func.vmap(lambda x, c, y: net(x[None], c, y[None])[0])(x, c, y)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_second_and_forward_derivatives(net):
    x, c, y = batch(net.double())
    x, v = x.double(), torch.randn(x.shape, dtype=torch.float64)

    def divergence(x: torch.Tensor) -> torch.Tensor:
        return torch.func.vjp(lambda x: net(x, c, y), x)[1](v)[0].mul(v).sum()

    slope = torch.func.grad(divergence)(x).mul(v).sum()
    h = 1e-5
    assert slope.item() == pytest.approx(
        ((divergence(x + h * v) - divergence(x - h * v)) / (2 * h)).item(), rel=1e-6
    )
    tangent = torch.func.jvp(lambda x: net(x, c, y), (x,), (v,))[1]
    torch.testing.assert_close(tangent.mul(v).sum(), divergence(x))


@pytest.mark.parametrize("net", ["mlp", "unet 2-d"], indirect=True)
def test_compiles_whole(net):
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for n in (3, 4):
        inputs = batch(net, n)
        torch.testing.assert_close(compiled(*inputs), net(*inputs))


@pytest.mark.parametrize("size", [(3, 2), (9, 8)], ids=["plain", "fused"])
def test_attention_is_softmax_written_out(size):
    attention, heads, n = Attention(8, 2), 2, 4
    nn.init.normal_(attention.out.weight)
    x = torch.randn(3, 8, *size)
    h = F.group_norm(x, 2, eps=1e-6).flatten(2)
    q, k, v = attention.qkv(h.transpose(1, 2)).chunk(3, dim=2)
    result = torch.zeros(3, math.prod(size), 8)
    for head in range(heads):
        part = slice(n * head, n * head + n)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(n), dim=2)
        result[..., part] = weights @ v[..., part]
    expected = x + attention.out(result).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_attention_stands_where_it_is_asked_for():
    net = UNet((1, 16, 12), 8, (1, 2, 4), blocks=2, attention=(8,))
    down = [m for m in net.down if isinstance(m, Block)]
    up = [m for m in net.up if isinstance(m, Block)]
    assert [isinstance(m.attention, Attention) for m in down] == [False] * 2 + [True] * 2 + [
        False
    ] * 2
    assert [isinstance(m.attention, Attention) for m in up] == [False] * 3 + [True] * 3 + [
        False
    ] * 3
    assert [isinstance(m.attention, Attention) for m in net.middle] == [True, False]


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (512, 32), (48, 12), (36, 9), (37, 1), (6, 1), (1, 1)]
)
def test_group_norm_has_groups_of_four_or_more_where_it_can(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_waves_are_their_formulas():
    c = torch.tensor([-2.5, 0.0, 0.7])
    phase = c[:, None] * torch.tensor([0.5, 2.0 ** (4 / 3), 2.0 ** (11 / 3), 64.0])
    torch.testing.assert_close(Sinusoidal(8)(c), torch.cat([phase.cos(), phase.sin()], 1))
    waves = Fourier(5)
    generator = torch.Generator().manual_seed(0)
    omega, phi = torch.randn(5, generator=generator), torch.rand(5, generator=generator)
    exact = math.sqrt(2) * torch.cos(2 * math.pi * (c[:, None] * omega + phi))
    torch.testing.assert_close(waves(c), exact)


@pytest.mark.parametrize("kind", WAVES)
def test_an_embedding_written_out(kind):
    net = Embedding(kind, 7, 6, 3)
    c, y = torch.tensor([-2.0, 0.3, 1.0]), torch.tensor([2, -1, 0])
    w = net.state_dict()
    h = WAVES[kind](8)(c) @ w["linear_1.weight"].T + w["linear_1.bias"]
    h = (h * torch.sigmoid(h)) @ w["linear_2.weight"].T + w["linear_2.bias"]
    # The first vector is that of 'no label'.
    torch.testing.assert_close(net(c, y), h + w["label.weight"][[3, 0, 1]])
    torch.testing.assert_close(net(c, None), h + w["label.weight"][0])
    plain = Embedding(kind, 7, 6, None)
    plain.load_state_dict({k: v for k, v in w.items() if k != "label.weight"})
    torch.testing.assert_close(plain(c, None), h)


def test_an_mlp_written_out():
    net = awake(MLP((2, 2), width=6, depth=2, classes=3))
    x, c, y = batch(net)
    w = {k: v.detach() for k, v in net.state_dict().items()}

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h):
        return h * torch.sigmoid(h)

    def norm(h):
        h = h - h.mean(1, keepdim=True)
        return h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt()

    e = silu(net.embedding(c, y))
    h = linear("input", x.flatten(1))
    for i in range(2):
        scale, shift = linear(f"layers.{i}.modulation", e).split(6, 1)
        u = linear(f"layers.{i}.linear_1", norm(h) * (1 + scale) + shift)
        h = h + linear(f"layers.{i}.linear_2", silu(u))
    h = norm(h) * w["norm.weight"] + w["norm.bias"]
    torch.testing.assert_close(net(x, c, y), linear("output", silu(h)).reshape(3, 2, 2))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_block_written_out(scale_shift):
    net = awake(Block(Space(2), 3, 8, 0.0, scale_shift, 2))
    x, e = torch.randn(2, 3, 4, 5), torch.randn(2, 16 if scale_shift else 8)
    h = F.silu(F.group_norm(x, 1, net.norm_1.weight, net.norm_1.bias, 1e-6))
    h = F.conv2d(h, net.conv_1.weight, net.conv_1.bias, padding=1)
    e = e[:, :, None, None]
    h = h if scale_shift else h + e
    h = F.group_norm(h, 2, net.norm_2.weight, net.norm_2.bias, 1e-6)
    h = F.silu(h * (1 + e[:, :8]) + e[:, 8:] if scale_shift else h)
    h = F.conv2d(h, net.conv_2.weight, net.conv_2.bias, padding=1)
    h = h + F.conv2d(x, net.skip.weight, net.skip.bias)
    torch.testing.assert_close(net(x, e.flatten(1)), net.attention(h))


def test_the_ladder_of_a_unet_written_out():
    net = awake(UNet((1, 5, 6), 4, (1, 2), blocks=1, classes=2))
    x, c, y = batch(net, 2)
    e = iter(net.project(F.silu(net.embedding(c, y))).split(net.splits, 1))
    (block_1, down, block_2), (middle_1, middle_2) = net.down, net.middle
    up_1, up_2, enlarge, up_3, up_4 = net.up
    h_0 = net.input(x)
    h_1 = block_1(h_0, next(e))
    h_2 = down(h_1)
    assert h_2.shape == (2, 4, 3, 3)
    h_3 = block_2(h_2, next(e))
    h = middle_2(middle_1(h_3, next(e)), next(e))
    h = up_1(torch.cat([h, h_3], 1), next(e))
    h = up_2(torch.cat([h, h_2], 1), next(e))
    h = enlarge(h, (5, 6))
    h = up_3(torch.cat([h, h_1], 1), next(e))
    h = up_4(torch.cat([h, h_0], 1), next(e))
    assert next(e, None) is None
    torch.testing.assert_close(net(x, c, y), net.output(F.silu(net.norm(h))))


def test_enlarging_repeats_the_nearest():
    net = Enlarge(Space(2), 2)
    x = torch.randn(1, 2, 2, 3)
    near = x[:, :, [0, 0, 1]][:, :, :, [0, 0, 1, 1, 2, 2]]
    exact = F.conv2d(near, net.conv.weight, net.conv.bias, padding=1)
    torch.testing.assert_close(net(x, (3, 6)), exact)


@pytest.mark.parametrize(("kind", "nats"), [("sinusoidal", 0.3), ("fourier", 0.6)])
def test_the_noise_level_is_well_resolved(kind, nats):
    # A function that changes within a fraction of a nat of log(sigma / alpha) is linear in waves.
    c = torch.linspace(-2.5, 1.2, 2000, dtype=torch.float64)
    waves = WAVES[kind](128)(c)
    assert waves.shape == (2000, 128)
    for centre in (-2.0, -0.3, 0.9):
        target = torch.tanh((c - centre) * 4 / nats)
        fit = waves @ torch.linalg.lstsq(waves, target[:, None], driver="gelsd").solution
        assert (fit[:, 0] - target).abs().max() < 0.05


@pytest.mark.parametrize(
    "build", [lambda: UNet((1, 4), 8, (1,), dropout=0.5), lambda: MLP((4,), dropout=0.5)]
)
def test_dropout_acts_in_training_only(build):
    net = awake(build())
    x, c, _ = batch(net)
    assert (net(x, c) == net(x, c)).all()
    net.train()
    assert (net(x, c) != net(x, c)).any()


def test_mlp_with_other_outputs_is_a_classifier():
    net = awake(MLP((1, 4, 4), width=8, depth=1, outputs=10))
    assert net(torch.randn(5, 1, 4, 4), torch.zeros(5)).shape == (5, 10)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_bad_input(build):
    net = build()
    x, c, y = batch(net)
    with pytest.raises(TypeError, match=r"x must be floating, got torch.uint8: scale integer"):
        net(x.byte(), c)
    with pytest.raises(ValueError, match=r"x must be \(B, .*\), got \(3, 4\)"):
        net(torch.zeros(3, 4), c)
    with pytest.raises(ValueError, match=r"c must be \(\) or \(3,\), got \(2,\)"):
        net(x, c[:2])
    with pytest.raises(ValueError, match=r"c must be \(\) or \(3,\), got \(3, 1\)"):
        net(x, c[:, None])
    with pytest.raises(ValueError, match=r"y must be \(3,\), got \(2,\)"):
        net(x, c, y[:2])
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        net(x, c, y.float())
    for wrong in (-2, 4):
        with pytest.raises(ValueError, match=rf"\[0, 4\), or be -1 for 'no label'; got .*{wrong}"):
            net(x, c, torch.tensor([1, wrong, 2]))
    unconditional = type(net)(**{**net.config, "classes": None})
    with pytest.raises(ValueError, match="labels y were given to a network without classes"):
        unconditional(x, c, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, r"shape must hold one or more sizes"),
        ({"shape": (1, 0, 4)}, "each of shape must be an integer >= 1, got 0"),
        ({"shape": (4,)}, r"shape must be \(C, \*S\) with 1 to 3 sizes S, got \[4\]"),
        ({"shape": (1, 2, 3, 4, 5)}, r"1 to 3 sizes S"),
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"multipliers": ()}, "multipliers must be positive, one for each level, got none"),
        ({"multipliers": (1, 0)}, "each of multipliers must be an integer >= 1, got 0"),
        ({"blocks": -1}, "blocks must be an integer >= 0, got -1"),
        ({"attention": (16,)}, r"attention at \[16\]: the levels have the sizes \[8, 4\]"),
        ({"heads": 3}, "16 channels do not divide into 3 heads"),
        ({"classes": 0}, "classes must be an integer >= 1, got 0"),
        ({"embedding": "wavelet"}, r"one of \['fourier', 'sinusoidal'\], got 'wavelet'"),
    ],
)
def test_unet_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"shape": (1, 8, 8), **SMALL, **arguments})


def test_mlp_arguments():
    for name in ("width", "depth", "outputs"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            MLP(**{"shape": (2,), name: 0})
