"""Conditions: vectors, images and sequences, from the data to the network, and out of the way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sde_gen as sg
from sde_gen.data.sources import as_source
from sde_gen.networks import MLP, DiT, Network, UNet
from sde_gen.networks.blocks import CrossAttention, Gate, Space, cut
from sde_gen.networks.context import shapes_of
from sde_gen.noise import Streams
from sde_gen.scores import ScoreNetwork
from sde_gen.training import Denoising, load, save
from sde_gen.training.losses import drop

CONTEXT = {"theta": (3,), "image": (2, 4, 6), "text": (None, 5)}
SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
NETWORKS = {
    "mlp": lambda: MLP((3, 2), 16, 2, classes=4, context={"theta": (3,), "image": (2, 4, 6)}),
    "unet": lambda: UNet((1, 4, 6), **SMALL, classes=4, context=CONTEXT),
    "unet, all options": lambda: UNet(
        (1, 4, 6), **SMALL, heads=2, attention=(6,), context=CONTEXT, gates=True, periodic=True
    ),
    "unet 1-d": lambda: UNet((2, 9), **SMALL, context={"image": (1, 9), "text": (None, 5)}),
    "dit": lambda: DiT((1, 4, 6), 2, 16, 2, 2, classes=4, context=CONTEXT),
    "dit 1-d": lambda: DiT((2, 9), 3, 16, 2, 2, context={"image": (1, 9), "text": (None, 5)}),
}


def awake(net: nn.Module) -> nn.Module:
    """The network with random weights where it starts at zero, in evaluation."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if not p.any():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return net.eval()


@pytest.fixture(params=NETWORKS)
def net(request) -> Network:
    torch.manual_seed(0)
    return awake(NETWORKS[request.param]())


def rows(net: Network, n: int = 3, length: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(n, *(length if s is None else s for s in shape), generator=generator)
        for name, shape in net.context.items()
    }


def state(net: Network, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, *net.shape, generator=torch.Generator().manual_seed(2))
    return x, torch.linspace(-2, 1, n)


# ---- networks ----


def test_every_condition_is_read_and_nan_is_its_absence(net):
    x, c = state(net)
    given = rows(net)
    whole = net(x, c, **given)
    assert whole.shape == x.shape
    for name, v in given.items():
        assert not torch.allclose(net(x, c, **{**given, name: v + 1}), whole, atol=1e-4)
        rest = {k: w for k, w in given.items() if k != name}
        absent = net(x, c, **rest)
        assert not torch.allclose(absent, whole, atol=1e-4)
        for nothing in (None, torch.full_like(v, torch.nan)):
            torch.testing.assert_close(net(x, c, **rest, **{name: nothing}), absent)
        # Absent is something learned, and not the number zero.
        assert not torch.allclose(net(x, c, **rest, **{name: 0 * v}), absent, atol=1e-4)
        mixed = v.clone()
        mixed[1] = torch.nan
        both = net(x, c, **rest, **{name: mixed})
        torch.testing.assert_close(both, torch.stack([whole[0], absent[1], whole[2]]))


def test_one_condition_serves_the_whole_batch(net):
    x, c = state(net)
    given = {name: v[:1].expand_as(v) for name, v in rows(net).items()}
    one = {name: v[0] for name, v in given.items()}
    torch.testing.assert_close(net(x, c, **one), net(x, c, **given))
    torch.testing.assert_close(net(x, c[0], **one), net(x, c[:1].expand(3), **given))


def test_sequences_are_filled_up_with_nan(net):
    if "text" not in net.context:
        pytest.skip("takes none")
    x, c = state(net)
    given = rows(net)
    short = {**given, "text": given["text"][:, :2]}
    filled = torch.cat([short["text"], torch.full((3, 70, 5), torch.nan)], 1)
    torch.testing.assert_close(net(x, c, **{**given, "text": filled}), net(x, c, **short))
    turned = net(x, c, **{**given, "text": given["text"].flip(1)})
    torch.testing.assert_close(turned, net(x, c, **given), atol=1e-5, rtol=1e-4)


def test_gradients_of_what_is_absent_are_finite(net):
    x, c = state(net)
    given = {
        name: v.index_fill(0, torch.tensor([0, 2]), torch.nan) for name, v in rows(net).items()
    }
    net.train()(x, c, **given).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    nothing = [p for name, p in net.named_parameters() if name.endswith("nothing")]
    assert len(nothing) == len(net.context)
    assert all(p.grad is not None and p.grad.any() for p in nothing)


def test_config_rebuilds_it_whatever_the_order_of_the_names(net):
    config = json.loads(json.dumps(net.config))
    config["context"] = dict(reversed(config["context"].items()))
    twin = type(net)(**config)
    twin.load_state_dict(net.state_dict())
    x, c = state(net)
    assert (twin.eval()(x, c, **rows(net)) == net(x, c, **rows(net))).all()
    assert twin.config == net.config
    assert twin.context == net.context


def test_a_number_may_come_without_its_axis():
    net = awake(MLP((2,), 16, 1, context={"mass": (1,)}))
    x, c = state(net)
    mass = torch.tensor([0.5, 1.0, -1.0])
    torch.testing.assert_close(net(x, c, mass=mass), net(x, c, mass=mass[:, None]))


@pytest.mark.parametrize(
    ("context", "error", "text"),
    [
        ({"x": (3,)}, ValueError, "cannot be called 'x'"),
        ({"weight": (3,)}, ValueError, "cannot be called 'weight'"),
        ({"a b": (3,)}, ValueError, "cannot be called"),
        ({"class": (3,)}, ValueError, "cannot be called"),
        ({"theta": 3}, TypeError, "must be sizes"),
        ({"theta": ()}, TypeError, "must be sizes"),
        ({"theta": (0,)}, ValueError, "each of context 'theta'"),
        ({"theta": (None,)}, ValueError, "each of context 'theta'"),
        ({"theta": (3, None)}, ValueError, "each of context 'theta'"),
        ([("theta", (3,))], TypeError, "shapes by name"),
    ],
)
def test_shapes_that_are_none_are_refused(context, error, text):
    with pytest.raises(error, match=text):
        shapes_of(context)


def test_networks_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match="take UNet or DiT"):
        MLP((2,), context={"text": (None, 3)})
    with pytest.raises(ValueError, match=r"must be \(n,\), \(C, 8, 8\) or \(None, n\)"):
        UNet((1, 8, 8), context={"image": (1, 8, 9)})
    net = MLP((2,), 8, 1, context={"theta": (3,)})
    x, c = torch.zeros(4, 2), torch.tensor(0.0)
    with pytest.raises(ValueError, match="'thta' was given to a network that takes theta"):
        net(x, c, thta=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"must be \(4, 3\), got \(4, 2\)"):
        net(x, c, theta=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"must be \(4, 3\), got \(5, 3\)"):
        net(x, c, theta=torch.zeros(5, 3))
    with pytest.raises(TypeError, match="must be floating"):
        net(x, c, theta=torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="has no context="):
        MLP((2,), 8, 1)(x, c, theta=torch.zeros(4, 3))


def test_cross_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    cross, peer = awake(CrossAttention(8, 2, 6)), nn.MultiheadAttention(8, 2, batch_first=True)
    x, tokens = torch.randn(3, 8, 2, 5), torch.randn(3, 7, 6)
    there = torch.arange(7) < torch.tensor([[7], [1], [4]])
    h = cross.norm(x).flatten(2).mT
    k, v = cross.kv(tokens).chunk(2, 2)
    # Its own projections of q, k and v are switched off: here they are part of the layer.
    eye = torch.eye(8).repeat(3, 1)
    peer.in_proj_weight.data, peer.in_proj_bias.data = eye, torch.zeros(24)
    peer.out_proj.load_state_dict(cross.out.state_dict())
    expected, _ = peer(cross.q(h), k, v, key_padding_mask=~there)
    torch.testing.assert_close(cross(x, tokens, there), x + expected.mT.reshape(x.shape))


def test_a_gate_is_the_published_formula():
    torch.manual_seed(0)
    gate = awake(Gate(Space(2), 6, 4))
    skip, h = torch.randn(2, 6, 3, 5), torch.randn(2, 4, 3, 5)
    w = {name: p.flatten(1) if p.ndim > 1 else p for name, p in gate.named_parameters()}
    q = torch.einsum("oi,bi...->bo...", w["skip.weight"], skip)
    q = q + torch.einsum("oi,bi...->bo...", w["h.weight"], h)
    q = q + (w["skip.bias"] + w["h.bias"])[:, None, None]
    q = torch.einsum("oi,bi...->bo...", w["psi.weight"], q.clamp_min(0)) + w["psi.bias"]
    torch.testing.assert_close(gate(skip, h), skip / (1 + torch.exp(-q)))
    fresh = Gate(Space(2), 6, 4)
    torch.testing.assert_close(fresh(skip, h), skip / 2)


def test_a_periodic_network_knows_no_border():
    torch.manual_seed(0)
    options = {**SMALL, "attention": (4,), "gates": True}
    x, c = torch.randn(2, 1, 8, 8), torch.tensor(0.3)
    net = awake(UNet((1, 8, 8), **options, periodic=True))
    moved = net(x.roll((2, 4), (2, 3)), c).roll((-2, -4), (2, 3))
    torch.testing.assert_close(moved, net(x, c), atol=1e-5, rtol=1e-4)
    net = awake(UNet((1, 8, 8), **options))
    assert not torch.allclose(net(x.roll(4, 2), c).roll(-4, 2), net(x, c), atol=1e-3)


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = awake(UNet((1, 4, 6), **SMALL, dropout=0.3, context=CONTEXT, recompute=recompute))
        x, c = state(net)
        torch.manual_seed(1)
        net.train()(x, c, **rows(net)).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_recomputing_keeps_no_activations_of_a_block():
    kept = []
    for recompute in (False, True):
        net = UNet((1, 8, 8), **SMALL, recompute=recompute).train()
        size = 0

        def count(t: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            net(torch.randn(4, 1, 8, 8), torch.tensor(0.0))
        kept.append(size)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(("size", "millions"), [(64, 296), (128, 422), (256, 554)])
def test_adm_has_the_published_size(size, millions):
    """Dhariwal & Nichol 2021, table 4: within a tenth, as their blocks also change resolution."""
    with torch.device("meta"):
        net = UNet.adm(size, classes=1000)
    assert net.shape == (3, size, size)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=0.1)


def test_adm_refuses_other_sizes():
    with pytest.raises(ValueError, match="one of 64, 128, 256, got 32"):
        UNet.adm(32)


# ---- the transformer ----


def test_dit_has_the_published_size():
    """Peebles & Xie 2023, table 1: DiT-S 33 M and DiT-B 130 M at patch 2, of (4, 32, 32)."""
    with torch.device("meta"):
        small = DiT((4, 32, 32), 2, 384, 12, 6, classes=1000, head=True)
        base = DiT((4, 32, 32), 2, 768, 12, 12, classes=1000, head=True)
    assert round(sum(p.numel() for p in small.parameters()) / 1e6) == 33
    assert round(sum(p.numel() for p in base.parameters()) / 1e6) == 131  # time features: width


def test_patches_are_those_of_unfold():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(cut(x, 2).flatten(2), F.unfold(x, 2, stride=2))


def test_a_layer_of_the_transformer_written_out():
    torch.manual_seed(0)
    net = awake(DiT((1, 4), 2, 8, 1, 2))
    layer = net.layers[0]
    peer = nn.MultiheadAttention(8, 2, batch_first=True)
    peer.in_proj_weight.data, peer.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
    peer.out_proj.load_state_dict(layer.out.state_dict())
    h, e = torch.randn(3, 5, 8), torch.randn(3, 1, 8)
    a, b, g, p, q, r = layer.modulation(e).split(8, 2)
    u = (1 + b) * F.layer_norm(h, (8,), eps=1e-6) + a
    mid = h + g * peer(u, u, u)[0]
    u = (1 + q) * F.layer_norm(mid, (8,), eps=1e-6) + p
    expected = mid + r * layer.linear_2(F.gelu(layer.linear_1(u), approximate="tanh"))
    torch.testing.assert_close(layer(h, e, None), expected)


def test_the_transformer_starts_at_zero_and_refuses_sizes_that_do_not_fit():
    net = DiT((1, 4, 6), 2, 16, 2, 2, classes=3, head=True)
    x, c = state(net)
    out = net(x, c, [0, 1, -1])
    assert out.shape == (3, 2, 4, 6)
    assert not out.any()
    with pytest.raises(ValueError, match="multiple of the patch, 4"):
        DiT((1, 4, 6), 4)
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        DiT((1, 4, 6), 2, 16, heads=5)


# ---- scores ----


def model_of(context, shape=(2,), **options) -> ScoreNetwork:
    torch.manual_seed(0)
    return ScoreNetwork(awake(MLP(shape, 16, 2, context=context, **options)), sg.VP())


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
THETA = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def test_given_takes_a_row_a_sample_or_one_for_all():
    model = model_of({"theta": (3,)})
    expected = model(X, 0.5, theta=THETA)
    for value in (THETA, THETA.numpy(), THETA.tolist(), THETA.double().numpy()):
        torch.testing.assert_close(model.given(theta=value)(X, 0.5), expected)
    each = torch.cat([model.given(theta=t)(x[None], 0.5) for t, x in zip(THETA, X, strict=True)])
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)
    one = model.given(theta=THETA[1].tolist())
    assert one.batch is None
    torch.testing.assert_close(one(X, 0.5), model(X, 0.5, theta=THETA[1].expand(4, 3)))
    torch.testing.assert_close(
        model.given(theta=THETA).rows(torch.tensor([2, 0]))(X[:2], 0.5),
        model(X[:2], 0.5, theta=THETA[[2, 0]]),
    )
    none = model.given(theta=THETA).rows(torch.tensor([], dtype=torch.int64))
    assert none.batch == 0  # samplers whose samples have all ended ask for these
    with pytest.raises(ValueError, match=r"theta must be \(3\) or \(N, 3\), got \(4, 2\)"):
        model.given(theta=X)


def test_one_number_may_be_given_as_it_is():
    model = model_of({"mass": (1,)})
    expected = model(X, 0.5, mass=torch.full((4, 1), 2.0))
    for value in (2, 2.0, np.float32(2), torch.tensor(2.0), [2.0], torch.full((4,), 2.0)):
        torch.testing.assert_close(model.given(mass=value)(X, 0.5), expected)


def test_labels_are_alike_however_they_are_held():
    model = model_of(None, classes=4)
    expected = model(X, 0.5, y=torch.tensor([1, 0, 3, 1]))
    guided = sg.ClassifierFree(model, 2.0, y=torch.tensor([1, 0, 3, 1]))(X, 0.5)
    for y in ([1, 0, 3, 1], np.array([1, 0, 3, 1], np.int32), torch.tensor([1, 0, 3, 1]).short()):
        torch.testing.assert_close(model.given(y=y)(X, 0.5), expected)
        torch.testing.assert_close(sg.ClassifierFree(model, 2.0, y=y)(X, 0.5), guided)
    for y in (3, np.int64(3), torch.tensor(3)):
        torch.testing.assert_close(model.given(y=y)(X, 0.5)[2], expected[2])
    with pytest.raises(TypeError, match="labels must be integers"):
        model.given(y=[0.5, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("weight", [0.0, 1.5, torch.tensor([0.0, 1.0, 2.0]), lambda t: 2 * t])
def test_guidance_by_everything_at_once(weight):
    torch.manual_seed(0)
    net = awake(UNet((1, 4, 6), **SMALL, classes=4, context=CONTEXT))
    model = ScoreNetwork(net, sg.VP())
    given, x, y = rows(net), state(net)[0], torch.tensor([0, 3, 1])
    guided = sg.ClassifierFree(model, weight, y=y, **given)
    conditional, free = model(x, 0.5, y=y, **given), model(x, 0.5)
    w = weight(0.5) if callable(weight) else weight
    w = w[:, None, None, None] if isinstance(w, torch.Tensor) else w
    expected = conditional + w * (conditional - free)
    torch.testing.assert_close(guided(x, 0.5), expected, rtol=1e-4, atol=1e-4)
    some = guided.rows(torch.tensor([2, 1]))
    torch.testing.assert_close(some(x[[2, 1]], 0.5), expected[[2, 1]], rtol=1e-4, atol=1e-4)


def test_guidance_by_one_condition_leaves_the_others():
    model = model_of({"theta": (3,), "mass": (1,)}, classes=4)
    mass = torch.rand(4, 1)
    kept = {"mass": mass, "y": torch.tensor([0, 1, 2, 3])}
    conditional, free = model(X, 0.5, theta=THETA, **kept), model(X, 0.5, **kept)
    guided = sg.ClassifierFree(model.given(**kept), 2.0, theta=THETA)
    torch.testing.assert_close(guided(X, 0.5), 3 * conditional - 2 * free)
    later = sg.ClassifierFree(model, 2.0, theta=0 * THETA).given(**kept).given(theta=THETA)
    torch.testing.assert_close(later(X, 0.5), 3 * conditional - 2 * free)
    one = sg.ClassifierFree(model.given(**kept), 2.0, theta=THETA[0])
    assert one.classes == 4
    torch.testing.assert_close(one(X, 0.5)[0], (3 * conditional - 2 * free)[0])


class Foreign(nn.Module):
    """A network that knows nothing of NaN: an empty text is a vector of its own."""

    def forward(self, x, c, text=None):
        return x * text.sum(1, keepdim=True)


def test_of_foreign_networks_one_says_what_nothing_is():
    model = ScoreNetwork(Foreign(), sg.VP(), "score")
    with pytest.raises(ValueError, match="does not say how it knows that 'text' is absent"):
        sg.ClassifierFree(model, text=THETA)
    empty = torch.tensor([0.5, 0.0, 0.0])
    guided = sg.ClassifierFree(model, 1.0, nothing={"text": empty}, text=THETA)
    expected = 2 * model(X, 0.5, text=THETA) - model(X, 0.5, text=empty.expand(4, 3))
    torch.testing.assert_close(guided(X, 0.5), expected)
    torch.testing.assert_close(guided.rows(slice(1, 3))(X[1:3], 0.5), expected[1:3])
    with pytest.raises(TypeError, match="nothing to guide by"):
        sg.ClassifierFree(model, 1.0)


# ---- training ----


class Recorder(nn.Module):
    """Predicts nothing, and keeps what it was given."""

    def __init__(self, context=None) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []
        if context is not None:
            self.context = context

    def forward(self, x, c, **context):
        self.seen.append(context)
        return self.weight * x


RECIPE = sg.Recipe(steps=3, batch=50, holdout=0.0)
N = 50
PAIRS = torch.randn(N, 2, generator=torch.Generator().manual_seed(4))
KNOWN = torch.arange(3.0 * N).reshape(N, 3) / 100


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int):
        return {"x": PAIRS[i].numpy(), "theta": KNOWN[i].numpy()}


def run(net: nn.Module, data, dropout: float = 0.0, **options) -> list[dict]:
    model = ScoreNetwork(net, sg.VP(), facts=sg.Facts.of(PAIRS))
    objective = Denoising(dropout=dropout)
    sg.train(
        model, data, recipe=RECIPE, objective=objective, progress=False, device="cpu", **options
    )
    return net.seen


@pytest.mark.parametrize("rows", [KNOWN, KNOWN.numpy()])
def test_named_tensors_reach_the_network_each_with_its_sample(rows):
    for seen in (run(Recorder(), PAIRS, context={"theta": rows}), run(Recorder(), Items())):
        assert len(seen) == 3
        for context in seen:
            assert context.keys() == {"theta"}
            order = context["theta"][:, 0].argsort()  # an epoch a batch: all items, in some order
            assert torch.equal(context["theta"][order], KNOWN)
    first = run(Recorder(), PAIRS, context={"theta": KNOWN})[0]["theta"]
    assert torch.equal(first, run(Recorder(), Items())[0]["theta"])


def test_only_what_a_network_declares_is_dropped():
    assert not run(Recorder(), PAIRS, 1.0, context={"theta": KNOWN})[0]["theta"].isnan().any()
    seen = run(Recorder({"theta": (3,)}), PAIRS, 1.0, context={"theta": KNOWN})
    assert seen[0]["theta"].isnan().all()


def test_conditions_are_dropped_at_their_rate_half_of_it_together():
    n, p = 40_000, 0.2
    y, theta = torch.zeros(n, dtype=torch.int64), torch.ones(n, 3)
    text = torch.ones(n, 2, 4)
    dropped = drop({"y": y, "theta": theta, "text": text}, p, Streams(0))
    gone = [dropped["y"] == -1, dropped["theta"].isnan(), dropped["text"].isnan()]
    assert all((g.flatten(1).all(1) == g.flatten(1).any(1)).all() for g in gone[1:])
    gone = torch.stack([g if g.ndim == 1 else g.flatten(1).any(1) for g in gone])
    error = 4.5 / math.sqrt(n)
    assert (gone.double().mean(1) - p).abs().max() < error * math.sqrt(p * (1 - p))
    # All: p / 2, and of the rest each by itself with q, (1 - p / 2) q = p / 2.
    q = (p / 2) / (1 - p / 2)
    together = p / 2 + (1 - p / 2) * q**3
    assert abs(float(gone.all(0).double().mean()) - together) < error * math.sqrt(together)
    only = (1 - p / 2) * q * (1 - q) ** 2
    alone = gone & (gone.sum(0) == 1)
    assert (alone.double().mean(1) - only).abs().max() < error * math.sqrt(only)


@pytest.mark.parametrize(
    ("context", "error", "text"),
    [
        (None, ValueError, "the network takes theta"),
        ({"theta": KNOWN[:, :2]}, ValueError, r"must be \(50, 3\), got \(50, 2\)"),
        ({"theta": KNOWN[:9]}, ValueError, "a row for each of 50 samples"),
        ({"theta": KNOWN.long()}, TypeError, "must be floating"),
        ({"theta": KNOWN.tolist()}, TypeError, "context 'theta' must be a torch.Tensor"),
        ({"theta": KNOWN / 0}, ValueError, "NaN in part|infinite"),
        ({"theta": KNOWN.masked_fill(KNOWN == 0.01, torch.nan)}, ValueError, "NaN in part"),
        ({"theta": KNOWN, "mass": KNOWN}, ValueError, "'mass' was given to a network that takes"),
        ({"theta": KNOWN, "y": KNOWN}, ValueError, "labels y are labels="),
        (KNOWN, TypeError, "rows by name"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(context, error, text):
    with pytest.raises(error, match=text):
        run(Recorder({"theta": (3,)}), PAIRS, context=context)


def test_context_beside_items_and_labels_beside_context_are_refused():
    with pytest.raises(ValueError, match="whose items hold it"):
        as_source(Items(), context={"theta": KNOWN})
    model = model_of({"theta": (3,)})
    with pytest.raises(ValueError, match="the network has no classes"):
        sg.train(model, PAIRS, torch.zeros(N).long(), RECIPE, context={"theta": KNOWN})


def test_numbers_of_another_order_are_warned_of():
    with pytest.warns(UserWarning, match="'theta' has standard deviation"):
        run(Recorder({"theta": (3,)}), PAIRS, context={"theta": 1000 * KNOWN})


def test_rows_that_are_not_known_are_trained_as_absent():
    some = KNOWN.clone()
    some[::2] = torch.nan
    seen = run(Recorder({"theta": (3,)}), PAIRS, context={"theta": some})[0]["theta"]
    assert int(seen.isnan().all(1).sum()) == N // 2


def test_a_conditional_model_is_saved_and_loaded(tmp_path):
    for net in (
        model_of({"theta": (3,)}).net,
        awake(UNet((1, 4, 6), **SMALL, context=CONTEXT, gates=True, periodic=True)),
        awake(DiT((1, 4, 6), 2, 16, 1, 2, context=CONTEXT)),
    ):
        save(ScoreNetwork(net, sg.VP()), tmp_path / type(net).__name__)
        again = load(tmp_path / type(net).__name__)
        x, c = state(net)
        assert torch.equal(again.net(x, c, **rows(net)), net(x, c, **rows(net)))
        assert again.takes == net.context


def test_a_file_with_other_shapes_is_refused(tmp_path):
    save(model_of({"theta": (3,)}), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for context in ({"theta": "3"}, {"theta": [2]}, ["theta"], {"theta": [3], "b": [1]}):
        config["net"]["context"] = context
        file.write_text(json.dumps(config))
        with pytest.raises(sg.training.CheckpointError):
            load(tmp_path)


def test_training_goes_on_with_a_loaded_model(tmp_path):
    facts = sg.Facts.of(5 + 3 * PAIRS, units="column")
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), 8, 1, classes=2, context={"theta": (3,)}), sg.VP(), facts=facts)
    labels, context = torch.arange(N) % 2, {"theta": KNOWN}
    options = {"recipe": RECIPE, "progress": False, "device": "cpu"}
    sg.train(model, 5 + 3 * PAIRS, labels, context=context, folder=tmp_path, **options)
    old = load(tmp_path)
    old.tuned = sg.tune_solver(sg.Gaussian(sg.VP(), torch.zeros(2)), n=8, steps=(2,))
    before = {name: p.clone() for name, p in old.state_dict().items()}
    new = sg.train(old, 6 + 3 * PAIRS, labels, context=context, **options)
    assert new.tuned is None
    assert new.facts.std == facts.std  # the units stay those of the model
    assert torch.equal(new.facts.units.shift, facts.units.shift)
    moved = {
        name: (new.state_dict()[name] - p).abs().max() for name, p in before.items() if p.any()
    }
    # Adam moves a weight by about its rate a step at most: it began at the old ones.
    assert 0 < max(moved.values()) < 4 * RECIPE.lr
    with pytest.raises(ValueError, match=r"labels must lie in 0 .. 1"):
        sg.train(load(tmp_path), PAIRS, labels + 1, context=context, **options)
    with pytest.raises(ValueError, match="the network takes theta"):
        sg.train(load(tmp_path), PAIRS, labels, **options)
