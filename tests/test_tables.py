"""Tables: columns as vectors and back, files in and out, what is refused by row and column."""

from __future__ import annotations

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import johnsonsu, lognorm, multivariate_normal, norm
from sklearn.datasets import load_diabetes
from sklearn.mixture import GaussianMixture

import sde_gen as sg
from sde_gen import data
from sde_gen.cli import main
from sde_gen.cli.tables import compare, table_of
from sde_gen.data import Table, read_csv, write_csv
from sde_gen.data.tables import CLOUD
from sde_gen.likelihood import log_prob_of_rows
from sde_gen.networks import MLP, PrincipalMLP
from sde_gen.noise import Streams
from sde_gen.training import load, match_columns, save, validation

ROWS = {
    "height": ["1.75", "1.5", "-2e3"],
    "children": ["0", "2", "5"],
    "city": ["Oslo", "Rome, old", 'a "b"'],
    "smokes": ["1", "0", "1"],
    "code": ["3", "1", "2"],
}


def written(tmp_path, text: str, name: str = "t.csv"):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_kinds_are_guessed_from_what_is_written():
    table = Table.of(ROWS, {"code": "category"})
    kinds = ["continuous", "integer", "category", "category", "category"]
    assert [c.kind for c in table.columns] == kinds
    assert table.columns[4].values == ("1", "2", "3")  # in the order of the numbers
    assert Table.of({"a": ["10", "9", "10"]}).columns[0].values == ("9", "10")
    assert Table.of({"a": ["1.0", "2.0", "3.0"]}).columns[0].kind == "continuous"
    assert Table.of({"a": [str(2**20), "2", "3"]}).columns[0].kind == "integer"
    assert Table.of({"a": [str(2**20 + 1), "2", "3"]}).columns[0].kind == "continuous"
    assert str(table) == (
        "1 continuous: height; 1 integers: children; 3 categories: city (3), smokes (2), code (3)"
    )


def test_vectors_are_numbers_and_vertices():
    table = Table.of(ROWS, {"code": "category"})
    x = table.encode(ROWS)
    # height, children, city (Oslo, Rome, a), smokes (0, 1), code (1, 2, 3)
    expected = [
        [1.75, 0, 1, 0, 0, 0, 1, 0, 0, 1],
        [1.5, 2, 0, 1, 0, 1, 0, 1, 0, 0],
        [-2000, 5, 0, 0, 1, 0, 1, 0, 1, 0],
    ]
    assert x.tolist() == expected
    assert table.width == 10
    assert table.places("category").tolist() == list(range(2, 10))
    assert table.places("continuous", "integer").tolist() == [0, 1]


def test_files_go_round(tmp_path):
    file = tmp_path / "a.csv"
    write_csv(file, ROWS)
    table, x = read_csv(file, {"code": "category"})
    back = table.decode(x)
    assert back["children"].dtype == np.int64
    assert {k: v.tolist() for k, v in back.items()} == {
        "height": [1.75, 1.5, -2000.0],
        "children": [0, 2, 5],
        "city": ROWS["city"],
        "smokes": ROWS["smokes"],
        "code": ROWS["code"],
    }
    write_csv(tmp_path / "b.csv", back)
    assert torch.equal(table.read(tmp_path / "b.csv"), x)
    with (tmp_path / "b.csv").open(newline="") as opened:
        assert next(csv.reader(opened)) == list(ROWS)
    # Columns in another order, another delimiter, a mark at the beginning, spaces, empty lines.
    text = "﻿" + "\n".join(
        ["code; children ;city;smokes;height", "3;2;Oslo;0;1e1", "", "1;0;Oslo;1;0"]
    )
    found = table.read(written(tmp_path, text, "c.csv"), ";")
    assert found[:, 0].tolist() == [10.0, 0.0]
    assert table.decode(found)["code"].tolist() == ["3", "1"]


def test_columns_are_kept_as_json(tmp_path):
    table = Table.of(ROWS, {"code": "category"})
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table
    endless = '[{"name": "a", "kind": "skewed", "scale": 2.0}]'  # from what to what?
    for wrong in ("{}x", "[{}]", '[{"name": "a", "kind": "colour"}]', "3", "[1]", endless):
        with pytest.raises(ValueError, match="holds no columns"):
            Table.load(written(tmp_path, wrong, "wrong.json"))


def test_integers_fill_their_cells_and_categories_their_clouds():
    table = Table.of({"n": [3, 7, 5], "k": ["a", "b", "c"]})
    x = table.encode({"n": [3] * 20_000, "k": ["b"] * 20_000})
    v = table.spread(x, Streams(1))
    u = v[:, 0] - 3
    assert u.min() >= -0.5
    assert u.max() < 0.5
    assert abs(u.mean()) < 4 / math.sqrt(12 * 20_000)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / 20_000)
    z = (v[:, 1:] - torch.tensor([0.0, 1.0, 0.0])) / CLOUD
    assert (z.mean(0).abs() < 4 / math.sqrt(20_000)).all()
    assert (z.T.cov() - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 20_000)
    back = table.decode(v)
    assert (back["n"] == 3).all()
    # Two others are each nearer with probability Phi(-1 / (CLOUD sqrt 2)).
    wrong = 2 * norm.cdf(-1 / (CLOUD * math.sqrt(2))) * 20_000
    assert (back["k"] != "b").sum() < wrong + 5 * math.sqrt(wrong)
    assert torch.equal(table.spread(x[5:9], Streams(1, 5)), v[5:9])  # a function of the number
    far = torch.tensor([[-9.0, 0, 2, 1], [99.0, 0, 0.1, -5]])
    assert table.decode(far)["n"].tolist() == [3, 7]
    assert table.decode(far)["k"].tolist() == ["b", "b"]


def test_positive_numbers_are_their_logarithms():
    z = np.random.default_rng(0).standard_normal(200)
    rows = {"skew": np.exp(z), "some": [-1.5, *np.exp(z[1:])]}
    table = Table.of(rows, {"skew": "positive"})
    x = table.encode(rows)
    np.testing.assert_allclose(x[:, 0], z, atol=1e-6)
    np.testing.assert_allclose(table.decode(x)["skew"], rows["skew"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"row 1, column 'some': '-1.5' is not positive"):
        Table.of(rows, {"some": "positive"})
    alone = Table.of({"skew": rows["skew"]}, {"skew": "positive"})
    found = log_prob_of_rows(normal(), alone, x[:9, :1].double())
    exact = lognorm(1).logpdf(rows["skew"][:9])
    np.testing.assert_allclose(found, exact, atol=1e-4)
    # Compared in their own units.
    said = compare(alone, x[:, :1] + math.log(2), x[:, :1])[1].split()
    assert float(said[1]) == pytest.approx(2 * float(said[2]), rel=1e-4)


def normal() -> sg.CorrelatedMixture:
    """The score of N(0, 1), of vectors of one coordinate."""
    return sg.CorrelatedMixture(
        sg.VP(), torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double()
    )


def test_skewed_numbers_lose_their_skewness(tmp_path):
    z = np.random.default_rng(0).standard_normal(200)
    rows = {"right": np.exp(z), "left": 5 - np.exp(z), "even": 5 + z.clip(-3, 3)}
    table = Table.of(rows)
    assert [c.kind for c in table.columns] == ["skewed", "skewed", "continuous"]
    x = table.encode(rows).double().numpy()
    assert np.abs(skew(x[:, :2])).max() < 1e-5
    np.testing.assert_allclose(x[:, 0], x[:, 1], atol=1e-4)  # a mirror image, and the same map
    back = table.decode(table.encode(rows))
    for name, column in rows.items():
        np.testing.assert_allclose(back[name], column, rtol=1e-5)
    right, left, _ = table.columns
    np.testing.assert_allclose(x[:, 0], np.arcsinh((np.exp(z) - right.low) / right.scale), 1e-5)
    assert right.low == min(rows["right"])
    assert left.high == max(rows["left"])
    # Beyond the smallest value: it is read as any other, and not drawn.
    beyond = {"right": [right.low - 1.0], "left": [left.high + 1.0], "even": [0.0]}
    z = table.encode(beyond)
    np.testing.assert_allclose(table.numbers(z)[0], [right.low - 1.0, left.high + 1.0, 0], 1e-5)
    assert table.decode(z)["right"] == right.low
    assert table.decode(z)["left"] == left.high
    table.save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == table


def skew(x: np.ndarray) -> np.ndarray:
    """Of each column."""
    z = (x - x.mean(0)) / x.std(0)
    return (z**3).mean(0)


def test_skewness_must_stand_out_of_its_error():
    # Of eleven rows a skewness of 1.2 is within two standard errors, of 110 it is not.
    x = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.6, 0.35]
    assert 1.0 < skew(np.array(x)[:, None]) < 2 * math.sqrt(6 / 11)
    assert Table.of({"a": x}).columns[0].kind == "continuous"
    assert Table.of({"a": x * 10}).columns[0].kind == "skewed"
    assert Table.of({"a": x}, {"a": "skewed"}).columns[0].kind == "skewed"


def test_density_of_skewed_numbers_counts_the_volume():
    z = np.random.default_rng(0).standard_normal(200)
    table = Table.of({"a": 3 - np.exp(z)})  # a tail to the left
    column = table.columns[0]
    y = np.array([2.5, 1.0, -4.0])
    # asinh((y - a) / s) ~ N(0, 1) is Johnson's S_U with these parameters.
    exact = johnsonsu(0, 1, loc=column.high, scale=-column.scale)
    mirrored = exact.logpdf(2 * column.high - y)
    found = log_prob_of_rows(normal(), table, table.encode({"a": y}).double())
    np.testing.assert_allclose(found, mirrored, atol=2e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1.5,2\n2.5,\n", r"row 2, column 'b': the value is missing"),
        ("a,b\n1.5,2\nNaN,3\n", r"row 2, column 'a': the value is missing \('NaN'\)"),
        ("a,b\n1.5,x\n2.5,?\n", r"row 2, column 'b': the value is missing"),
        ("a,b\n1.5,2\n2.5\n", "row 2 has 1 values, expected 2"),
        ("a,b\n1.5,2\n2.5,3,4\n", "row 2 has 3 values, expected 2"),
        ("a,b,a\n1,2,3\n", "two columns have the name 'a'"),
        ("a,,c\n1,2,3\n", "column 2 has no name"),
        ("1,2\n3,4\n", "has no header"),
        ("a;b\n1;2\n3;4\n", "is the delimiter ';'"),
        ("a\tb\n1\t2\n", "is the delimiter '\\\\t'"),
        ("a,b\n", "holds 1 lines"),
        ("", "holds 0 lines"),
        ("a,b\n1,2\n1,3\n", "column 'a' is '1' in every row"),
        ("a,b\n1,x\n2,x\n", "column 'b' is 'x' in every row"),
        ("a,b\n1.5,2\ninf,3\n", "row 2, column 'a': 'inf' is not finite"),
        ("a,b\n1.5,2\n1e39,3\n", "row 2, column 'a': '1e39' is not finite"),
        (
            "a\n" + "\n".join(f"{i}.5" for i in range(12)) + "\nmany\n",
            "row 13, column 'a': 'many'",
        ),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as error:
        read_csv(written(tmp_path, text))
    assert "t.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table at"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"a,b\n1,\xe9\n2,x\n")
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        read_csv(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match="one character"):
        read_csv(tmp_path / "latin.csv", delimiter=",,")
    with pytest.raises(ValueError, match="no column 'age'"):
        Table.of(ROWS, {"age": "integer"})
    with pytest.raises(ValueError, match="height must be one of"):
        Table.of(ROWS, {"height": "float"})
    with pytest.raises(ValueError, match=r"row 1, column 'height': '1.75' is no integer"):
        Table.of(ROWS, {"height": "integer"})
    with pytest.raises(ValueError, match="row 1, column 'city': 'Oslo' is no number"):
        Table.of(ROWS, {"city": "continuous"})
    with pytest.raises(ValueError, match="columns of one length"):
        Table.of({"a": [1, 2], "b": [1]})
    table = Table.of(ROWS)
    with pytest.raises(ValueError, match="row 2, column 'city': 'Bern' is none of the categories"):
        table.encode({**ROWS, "city": ["Oslo", "Bern", "Oslo"]})
    with pytest.raises(ValueError, match="the column 'city' is missing"):
        table.encode({k: v for k, v in ROWS.items() if k != "city"})
    with pytest.raises(ValueError, match="the column 'age' is unknown"):
        table.encode({**ROWS, "age": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"rows of this table are \(N, 8\)"):
        table.decode(torch.zeros(2, 7))


# --- the network along principal directions ------------------------------------------------------


@pytest.mark.parametrize("kind", ["continuous", "positive", "skewed", "integer", "category"])
def test_whole_numbers_are_what_decode_writes(kind):
    rng = np.random.default_rng(3)
    texts = rng.integers(2, 6, 50) if kind in ("integer", "category") else rng.gamma(1.0, size=50)
    table = Table.of({"a": texts}, {"a": kind})
    x = table.spread(table.encode({"a": texts}).double()) * 1.4 - 0.3  # some beyond the range
    found, written = table.whole(x), table.decode(x)["a"]
    if kind == "category":
        assert found.sum(1).eq(1).all()
        assert np.array(table.columns[0].values)[found.argmax(1)].tolist() == written.tolist()
        return
    assert np.array_equal(found[:, 0].numpy(), written)
    # The gradient of numbers is that of their map, for integers 1; beyond the range there is none.
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(table.whole(z).sum(), z)
    inside = (found > table.columns[0].low) & (found < table.columns[0].high)
    steps = (table.numbers(x + 1e-6) - table.numbers(x - 1e-6)) / 2e-6
    assert inside.sum() > 5
    torch.testing.assert_close(slope[inside], steps[inside], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        table.log_volume(x)[inside[:, 0]], steps[inside].log(), rtol=0, atol=1e-6
    )


# --- samples with the moments of the rows --------------------------------------------------------


def gaussian_of(table: Table, x: torch.Tensor) -> sg.ScoreNetwork:
    """An untrained network of the columns: N(0, C) in the units of its process."""
    facts = sg.Facts.of(x, "column", rank=table.width)
    net = PrincipalMLP((table.width,), 8, 1).fit(facts.encode(x))
    return sg.ScoreNetwork(net, sg.VP(), facts=facts)


def law_of(model: sg.ScoreNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact mean and covariance of its samples, where the network is untrained."""
    net, units = model.net, model.facts.units
    c = (net.directions @ net.variances.diag() @ net.directions.T).double()
    linear = units.linear(torch.eye(len(c), dtype=torch.float64)).T
    return units.decode(torch.zeros(1, len(c), dtype=torch.float64))[0], linear @ c @ linear.T


def test_samples_get_the_moments_of_the_rows():
    z = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    names = ("a", "b", "c")
    table = Table.of({n: v.tolist() for n, v in zip(names, z.T, strict=True)})
    model = gaussian_of(table, z)
    # Other rows: other means, deviations and correlations.
    rows = z @ torch.tensor([[1.2, 0.0, 0.0], [0.5, 0.9, 0.0], [0.0, -0.3, 0.8]]) + 0.3
    moved = match_columns(model, table, rows)
    mean, c = law_of(moved)
    d = c.diag().sqrt()
    real = rows.double()
    spread = real.std(0, correction=0)
    # 20,000 samples, and what the cost of the map leaves: tau / (tau + kappa) of a mean, of an
    # entry of c about tau / (4 + tau).
    assert ((mean - real.mean(0)) / spread).abs().max() < 0.3 * 0.01 + 4 / math.sqrt(20_000)
    assert (d / spread - 1).abs().max() < 0.25 * 0.03 + 4 / math.sqrt(40_000)
    gap = (c / torch.outer(d, d) - real.T.corrcoef()).abs().max()
    assert gap < 0.5 * 0.05 + 4 / math.sqrt(20_000)
    before, c = law_of(model)
    assert ((before - real.mean(0)) / spread).abs().max() > 0.2
    assert model.facts.units.mix is None  # the model that was given stays as it was
    again = match_columns(moved, table, rows)
    torch.testing.assert_close(law_of(again)[1], law_of(moved)[1], rtol=0, atol=0.05)


def test_a_law_that_has_the_moments_is_left_alone():
    """Even in a direction of a ten-thousandth of the variance, to the errors of the samples."""
    x = nearly_singular(500).float()
    table = Table.of({n: v.tolist() for n, v in zip("abc", x.T, strict=True)})
    model = gaussian_of(table, x)
    moved = match_columns(model, table, x)
    mean, c = law_of(moved)
    _, exact = law_of(model)
    root = torch.linalg.cholesky(exact)
    whitened = torch.linalg.solve(root, torch.linalg.solve(root, c).T)
    error = 5 / math.sqrt(20_000)
    assert (whitened - torch.eye(3)).abs().max() < 2 * error
    assert (
        torch.linalg.solve(root, mean) - torch.linalg.solve(root, x.double().mean(0))
    ).abs().max() < error


def test_every_kind_of_column_is_matched_and_categories_stay(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((400, 3))
    z[:, 1] += z[:, 0]
    texts = {
        "tail": np.exp(1.2 * z[:, 0]),
        "count": np.floor(3 + 2 * z[:, 1]).astype(int),
        "plain": z[:, 2],
        "city": np.where(z[:, 0] + z[:, 2] > 0, "Bern", "Oslo"),
    }
    table = Table.of(texts, {"tail": "skewed"})
    x = table.encode(texts)
    model = gaussian_of(table, 0.8 * table.spread(x))
    moved = match_columns(model, table, x)
    both = [sg.sample(m, 20_000, seed=3) for m in (model, moved)]
    torch.testing.assert_close(both[0][:, 3:], both[1][:, 3:], rtol=0, atol=1e-5)
    drawn, real = table.whole(both[1])[:, :3], table.numbers(x)[:, :3]
    spread = real.std(0, correction=0)
    assert ((drawn.mean(0) - real.mean(0)) / spread).abs().max() < 0.05
    assert (drawn.std(0) / spread - 1).abs().max() < 0.1
    assert (drawn.T.corrcoef() - real.T.corrcoef()).abs().max() < 0.1
    first = table.whole(both[0])[:, :3]
    assert (first.std(0) / spread - 1).abs().max() > 0.1
    save(moved, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.facts.units.mix, moved.facts.units.mix)
    assert torch.equal(sg.sample(loaded, 9, seed=3), sg.sample(moved, 9, seed=3))


def test_constant_columns_and_categories_alone_are_no_trouble():
    table = Table.of({"a": [0.5, 1.5, 2.5, 0.1], "n": [1, 2, 3, 1], "k": list("uvvu")})
    rows = table.encode({"a": [0.5, 0.5], "n": [2, 3], "k": ["u", "u"]})
    model = gaussian_of(
        table, table.spread(table.encode({"a": [0.5, 1.5], "n": [1, 3], "k": ["u", "v"]}))
    )
    mix = match_columns(model, table, rows, 200).facts.units.mix
    assert mix.isfinite().all()
    table = Table.of({"k": list("uvw")})
    x = table.encode({"k": list("uvw")})
    mix = match_columns(gaussian_of(table, table.spread(x)), table, x, 50).facts.units.mix
    assert torch.equal(mix, torch.eye(3, dtype=torch.float64))


def test_matching_is_refused():
    table = Table.of({"a": [0.5, 1.5]})
    x = table.encode({"a": [0.5, 1.5]})
    model = gaussian_of(table, x)
    with pytest.raises(TypeError, match="table must be a Table"):
        match_columns(model, [], x)
    with pytest.raises(TypeError, match="model must be a ScoreNetwork"):
        match_columns(normal(), table, x)
    with pytest.raises(ValueError, match=r"x must be \(N, 1\)"):
        match_columns(model, table, x[:, [0, 0]])
    with pytest.raises(ValueError, match="no units"):
        match_columns(sg.ScoreNetwork(MLP((1,), 8, 1), sg.VP()), table, x)
    with pytest.raises(ValueError, match="n must be"):
        match_columns(model, table, x, 1)


def nearly_singular(n: int) -> torch.Tensor:
    """Data of mean 0 and deviation 1 in each column, with a covariance of condition 10^4."""
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([z[:, 0], z[:, 0] + 0.02 * z[:, 1], 0.5 * z[:, 0] + z[:, 2]], 1)
    return (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(), sg.RectifiedFlow()])
def test_untrained_it_is_the_score_of_the_gaussian(sde):
    x = nearly_singular(500)
    net = PrincipalMLP((3,), 16, 1).double().fit(x)
    model = sg.ScoreNetwork(net, sde, facts=sg.Facts(shape=(3,)))
    c = x.T.cov(correction=0)
    for t in (0.02 * sde.T, 0.3 * sde.T, 0.9 * sde.T):
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        y = a * x[:9] + s * torch.randn(9, 3, generator=torch.Generator().manual_seed(1)).double()
        exact = -y @ torch.linalg.inv(a**2 * c + s**2 * torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(model(y, t), exact, rtol=1e-5, atol=1e-5 / s)


def test_coordinates_apart_start_independent():
    x = nearly_singular(400)
    net = PrincipalMLP((3,), 8, 1).double().fit(x, torch.tensor([2]))
    c = net.directions @ net.variances.diag() @ net.directions.T
    exact = x.T.cov(correction=0)
    exact[2, :2] = exact[:2, 2] = 0
    torch.testing.assert_close(c, exact)


def test_principal_directions_are_saved(tmp_path):
    x = nearly_singular(300).float()
    net = PrincipalMLP((3,), 8, 1).fit(x)
    with torch.no_grad():
        net.output.weight.normal_(generator=torch.Generator().manual_seed(2))
    model = sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts(shape=(3,)))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(x[:5], 0.4), model(x[:5], 0.4))
    with pytest.raises(ValueError, match="vectors"):
        PrincipalMLP((1, 8, 8))
    for wrong in (x[:, :2], x[:1]):
        with pytest.raises(ValueError, match="z must be"):
            PrincipalMLP((3,)).fit(wrong)


# --- densities of rows ---------------------------------------------------------------------------


def test_density_of_rows_is_exact_where_it_is_known():
    """Of a law that is the spread law of independent columns: log P in closed form."""
    table = Table.of({"x": [0.5, 1.5, 2.5], "k": ["a", "b", "b"]})
    sde = sg.VP()
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.0, 1, 0], [2.0, 0, 1]], dtype=torch.float64)
    cloud = torch.diag(torch.tensor([1.0, CLOUD**2, CLOUD**2], dtype=torch.float64))
    law = sg.CorrelatedMixture(sde, shares, means, torch.stack([cloud, cloud]))
    rows = {"x": [-1.0, 0.3, 2.0, 4.0], "k": ["a", "b", "a", "b"]}
    x = table.encode(rows).double()
    each = torch.tensor(
        np.stack([norm.logpdf(x[:, 0], m) for m in (-1.0, 2.0)]) + shares.log().numpy()[:, None]
    )
    k = torch.tensor([0, 1, 0, 1])
    joint = each[k, torch.arange(4)]
    # The other cloud reaches here with probability 2e-4 at most, times a ratio of densities.
    found = log_prob_of_rows(law, table, x)
    torch.testing.assert_close(found, joint, atol=0.02, rtol=0)
    alone = log_prob_of_rows(law, table, x, numbers=True)
    torch.testing.assert_close(alone, each.logsumexp(0), atol=0.02, rtol=0)


def test_density_of_numbers_alone_has_no_noise():
    table = Table.of({"x": [0.5, 1.5, 2.5], "y": [0.5, 1.5, -2.5]})
    c = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    law = sg.CorrelatedMixture(
        sg.VP(), torch.ones(1).double(), torch.zeros(1, 2).double(), c[None]
    )
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.tensor(multivariate_normal([0, 0], c.numpy()).logpdf(x.numpy()))
    for numbers in (False, True):
        found = log_prob_of_rows(law, table, x, numbers=numbers)
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)


def test_densities_are_refused():
    many = {f"k{i}": ["a", "b"] for i in range(7)}
    table = Table.of({"x": [0.5, 1.5], **many})
    model = sg.ScoreNetwork(MLP((15,), 8, 1), sg.VP())
    x = table.encode({"x": [0.5, 1.5], **many})
    with pytest.raises(ValueError, match="128 combinations"):
        log_prob_of_rows(model, table, x, numbers=True)
    with pytest.raises(ValueError, match=r"x must be \(N, 15\)"):
        log_prob_of_rows(model, table, x[:, :3])
    with pytest.raises(TypeError, match="table must be a Table"):
        log_prob_of_rows(model, [], x)


# --- the command line ----------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A table of 60 people, and a model of it, hardly trained."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    city = rng.integers(3, size=60)
    columns = {
        "height": (170 + 10 * city + 5 * rng.standard_normal(60)).round(3),
        "children": rng.poisson(1.5, 60),
        "city": np.array(["Bern", "Oslo", "Rome"])[city],
        "grade": rng.integers(1, 5, 60),
    }
    write_csv(folder / "people.csv", columns)
    options = ("--steps", 3, "--device", "cpu", "--kinds", "grade=category")
    assert run("train", folder / "people.csv", "--out", folder / "model", *options) == 0
    return folder


def test_train_says_what_the_columns_are(people, capsys):
    options = ("--steps", 2, "--device", "cpu", "--channels", 8)
    assert run("train", people / "people.csv", "--out", people / "said", *options) == 0
    said = capsys.readouterr().out
    assert "60 rows (--kinds NAME=KIND changes what a column is)" in said
    assert "1 continuous: height; 2 integers: children, grade; 1 categories: city (3)" in said
    assert "sample" in said
    assert "x.csv" in said


def test_samples_have_the_columns_and_their_types(people, capsys):
    out = people / "drawn.csv"
    options = ("--device", "cpu", "--steps", 4, "--n", 40)
    assert run("sample", people / "model", "--out", out, *options) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert list(rows[0]) == ["height", "children", "city", "grade"]
    assert {row["city"] for row in rows} <= {"Bern", "Oslo", "Rome"}
    assert {row["grade"] for row in rows} <= {"1", "2", "3", "4"}
    assert all(0 <= int(row["children"]) <= 8 for row in rows)
    # The Gaussian that it starts as has the mean of the trained rows, whose own is off by less.
    heights = np.array([float(row["height"]) for row in rows])
    model = load(people / "model")
    spread = float(model.facts.units.scale[0])
    assert abs(heights.mean() - float(model.facts.units.shift[0])) < 5 * spread / math.sqrt(40)
    vectors = people / "drawn.npz"
    assert run("sample", people / "model", "--out", vectors, *options) == 0
    with np.load(vectors) as arrays:
        whole = table_of(people / "model").decode(torch.from_numpy(arrays["x"]))
    assert whole["city"].tolist() == [row["city"] for row in rows]


def test_evaluate_prints_columns_and_densities(people, capsys):
    options = ("--device", "cpu", "--steps", 4, "--n", 30)
    assert run("evaluate", people / "model", people / "people.csv", *options) == 0
    said = capsys.readouterr().out
    assert "30 samples beside 60 real rows" in said
    assert "city = Rome" in said
    assert "log density of a row, in nats: " in said
    assert "log density of its numbers alone, in nats: " in said
    assert "the run of this model held these 6 real ones out" in said


def test_a_table_is_fitted_again_to_all_of_it(people, tmp_path, monkeypatch, capsys):
    """Nine tenths find how long to train; a run of its own then sees all."""
    monkeypatch.setattr(validation, "SAMPLES", 256)
    monkeypatch.setattr(validation, "LEAST", 20)
    file, out = people / "people.csv", tmp_path / "m"
    options = ("--device", "cpu", "--channels", 8, "--batch", 32, "--lr", 0.03)
    assert run("train", file, "--out", out, *options) == 0
    said = capsys.readouterr().out
    states = [torch.load(f / "training.pt", weights_only=True) for f in (out, out / "first")]
    step, loss = min(states[1]["validation"], key=lambda look: look[1])
    assert loss < states[1]["validation"][-1][1]
    assert step < states[1]["step"] < 500
    # The rate rises over 500 of 10,000 steps: step^2 / 1000 of its peak, in sum; its mean over a
    # run is a half.
    assert states[0]["step"] == max(1, round(step**2 / 500))
    assert f"least after {step} steps" in said
    table = table_of(out)
    rows = table.read(file)
    for folder, kept in ((out, torch.arange(60)), (out / "first", data.Order(60, 0, 0.1).kept)):
        units = load(folder).facts.units
        heights = rows[kept, 0].double()
        assert units.mix is not None  # its samples have the moments of these rows
        spread = float(heights.std(correction=0))
        assert float(units.scale[0]) == pytest.approx(spread, rel=1e-6)
    for folder, words in ((out, "are training data"), (out / "first", "held these 6 real")):
        assert run("evaluate", folder, file, "--n", 8, "--steps", 2, "--device", "cpu") == 0
        assert words in capsys.readouterr().out
    # Stopped between the two and taken up again it is the same.
    shutil.copytree(out / "first", tmp_path / "n" / "first")
    assert run("train", file, "--out", tmp_path / "n", *options, "--resume") == 0
    pairs = zip(load(out).parameters(), load(tmp_path / "n").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert run("train", file, "--out", out, *options) == 2  # there is a run already
    capsys.readouterr()
    assert run("train", file, "--out", tmp_path / "o", *options, "--no-refit") == 0
    assert not (tmp_path / "o" / "first").exists()
    nothing = ("--refit", "--holdout", 0, "--patience", 0, "--steps", 1)
    assert run("train", file, "--out", tmp_path / "p", *nothing) == 2
    assert "--refit trains on what is held out" in capsys.readouterr().err


def test_columns_are_compared_exactly():
    table = Table.of({"a": ["0.5", "1.5", "2.5"], "k": ["u", "v", "v"]})
    real = table.encode({"a": ["0.5", "1.5", "2.5"], "k": ["u", "v", "v"]})
    drawn = table.encode({"a": ["1.5", "2.5", "3.5"], "k": ["v", "u", "v"]})
    *_, said = compare(table, drawn, real)
    off = 1 / math.sqrt(2 / 3)  # a mean of 2.5 where 1.5 was
    a, k = np.array([0, 1, 2.0]), np.array([1, 0, 0.0])
    gap = abs(np.corrcoef(a, k)[0, 1] - np.corrcoef(a, k[[1, 0, 2]])[0, 1])
    assert said.startswith(f"largest: {off:.3f} of a mean (a), 0.000 of a deviation")
    assert f"{gap:.3f} of a correlation (a, k = " in said


def test_the_command_line_refuses(people, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert run(*arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    file, model = people / "people.csv", people / "model"
    new = ("--out", tmp_path / "m", "--steps", 1, "--device", "cpu")
    assert "NAME=KIND" in refused("train", file, *new, "--kinds", "grade")
    assert "--labels is of arrays" in refused("train", file, *new, "--labels", "city")
    assert "--levels is of arrays" in refused("evaluate", model, file, "--levels", 256)
    assert "no column 'age'" in refused("train", file, *new, "--kinds", "age=integer")
    semi = written(tmp_path, file.read_text().replace(",", ";"), "semi.csv")
    assert "is the delimiter ';'" in refused("train", semi, *new)
    bad = written(tmp_path, file.read_text().replace("Rome", "Bonn", 1), "bad.csv")
    assert "'Bonn' is none of the categories" in refused("evaluate", model, bad)
    toy = tmp_path / "toy"
    assert run("train", "two_moons", "--out", toy, "--steps", 1, "--device", "cpu") == 0
    capsys.readouterr()
    assert "was not trained on a table" in refused("sample", toy, "--out", tmp_path / "x.csv")
    assert "was not trained on a table" in refused("evaluate", toy, file)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_trained_table_beats_a_gaussian_mixture(tmp_path):
    """Diabetes, by one command: columns, correlations, and the density of rows held apart."""
    found = load_diabetes(scaled=False)
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    columns |= {"sex": columns["sex"].astype(int), "progression": found.target}
    order = data.Order(442, 0, 0.2)
    parts = {"train": order.kept.numpy(), "test": order.held.numpy()}
    for part, items in parts.items():
        write_csv(tmp_path / f"{part}.csv", {n: c[items] for n, c in columns.items()})
    model, out = tmp_path / "model", tmp_path / "out.csv"
    assert run("train", tmp_path / "train.csv", "--out", model, "--device", "cpu") == 0
    assert run("sample", model, "--out", out, "--n", 10_000, "--device", "cpu") == 0
    table = table_of(model)
    train, test, drawn = (table.read(tmp_path / f"{f}.csv") for f in ("train", "test", "out"))
    numbers = table.places("continuous")
    x, y = (v[:, numbers].double() for v in (drawn, train))
    # A tenth of the rows, held out to end the run, move a mean by 0.02 deviations at one sigma.
    assert ((x.mean(0) - y.mean(0)).abs() / y.std(0)).max() < 0.05 + 0.02
    assert (x.std(0) / y.std(0) - 1).abs().max() < 0.1
    assert (drawn.T.corrcoef() - train.T.corrcoef()).abs().max() < 0.1
    z = [(v[:, numbers].double() - y.mean(0)) / y.std(0) for v in (train, test)]
    mixtures = [GaussianMixture(k, random_state=0).fit(z[0]) for k in range(1, 9)]
    best = min(mixtures, key=lambda g: g.bic(z[0]))
    theirs = best.score_samples(z[1]).mean() - float(y.std(0).log().sum())
    assert float(log_prob_of_rows(load(model), table, test, numbers=True).mean()) > theirs
