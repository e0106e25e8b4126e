"""Tables trained by one command each, beside the best Gaussian mixture of scikit-learn.

Wine (178 rows, 13 numbers, 3 cultivars), breast cancer (569, 30, 2 diagnoses) and diabetes (442,
10 numbers with the progression, 2 sexes) of scikit-learn are written as CSV files, a fifth of the
rows in one of their own that nothing here is fitted to. Of each

    sde-gen train train.csv --out model
    sde-gen sample model --n 10000 --out samples.csv

are run with their defaults and several seeds of the training, and the samples are set beside all
rows of ``train.csv``: the largest difference of a mean, in deviations; of a deviation, relative;
of a correlation. (10,000 samples leave 0.01 of a mean and of a correlation, and of a deviation 1 %
where a column is nearly normal, up to 6 % where one row of 455 has a third of the variance.) The
log density of the numbers, in nats a row of the other fifth in their own units, is set beside that
of Gaussian mixtures, fitted to the standardised numbers of ``train.csv``: for each type of
covariance the one of 1 to 20 components that has the least BIC. Standard errors are those of means
over rows, of a gain those of the mean of differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.mixture import GaussianMixture

from sde_gen.cli import main
from sde_gen.cli.tables import compare, table_of
from sde_gen.data import Order, write_csv
from sde_gen.likelihood import log_prob_of_rows
from sde_gen.training import load

HERE = Path(__file__).parent
DRAWN = 10_000
TYPES = ("full", "tied", "diag", "spherical")


def wine() -> dict[str, Any]:
    """13 numbers and the cultivar."""
    found = load_wine()
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    return {**columns, "cultivar": found.target_names[found.target]}


def breast_cancer() -> dict[str, Any]:
    """30 numbers and the diagnosis."""
    found = load_breast_cancer()
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    return {**columns, "diagnosis": found.target_names[found.target]}


def diabetes() -> dict[str, Any]:
    """9 numbers, the sex, and the progression."""
    found = load_diabetes(scaled=False)
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    return {**columns, "sex": columns["sex"].astype(int), "progression": found.target}


SETS = {"wine": wine, "breast_cancer": breast_cancer, "diabetes": diabetes}


def mixtures(train: np.ndarray, test: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of each type of covariance the mixture of the least BIC: components, log density of rows."""
    shift, scale = train.mean(0), train.std(0)
    x, y = (train - shift) / scale, (test - shift) / scale
    found = {}
    for kind in TYPES:
        fitted = [GaussianMixture(k, covariance_type=kind, random_state=0) for k in range(1, 21)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best = min((g.fit(x) for g in fitted), key=lambda g: g.bic(x))
        logs = best.score_samples(y) - np.log(scale).sum()
        found[kind] = {"components": best.n_components, "bic": float(best.bic(x)), "logs": logs}
    return found


def written(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The rows of the two files, which are written."""
    columns = SETS[name]()
    order = Order(len(next(iter(columns.values()))), 0, 0.2)
    parts = {"train": order.kept.numpy(), "test": order.held.numpy()}
    for part, items in parts.items():
        write_csv(folder / f"{part}.csv", {n: c[items] for n, c in columns.items()})
    return parts


def judged(folder: Path, seed: int, beside: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One table: trained, drawn, compared."""
    model, out = folder / f"model{seed}", folder / "samples.csv"
    begun = time.process_time()
    words = ["train", str(folder / "train.csv"), "--out", str(model), "--device", "cpu"]
    assert main([*words, "--seed", str(seed)]) == 0
    seconds = time.process_time() - begun
    words = ["sample", str(model), "--n", str(DRAWN), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    table = table_of(model)
    assert table is not None
    train, test, drawn = (table.read(folder / f"{f}.csv") for f in ("train", "test", "samples"))
    lines = compare(table, drawn, train)
    print(lines[-1], flush=True)
    logs = log_prob_of_rows(load(model), table, test, numbers=True).double().numpy()
    best = min(beside.values(), key=lambda g: g["bic"])["logs"]
    highest = max((g["logs"] for g in beside.values()), key=np.mean)
    return {
        "columns": str(table),
        "training seconds": round(seconds, 1),
        "largest differences": lines[-1],
        "log density": mean(logs),
        "gain over the mixture of least BIC": mean(logs - best),
        "gain over the mixture that is best on the test rows": mean(logs - highest),
        "lines": lines,
    }


def compared(name: str, folder: Path, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """One table beside the mixtures, and then with every seed."""
    parts, columns = written(name, folder), SETS[name]()
    numbers = [n for n, c in columns.items() if c.dtype.kind == "f"]
    beside = mixtures(*(np.stack([columns[n][i] for n in numbers], 1) for i in parts.values()))
    said = {k: {**g, "bic": round(g["bic"]), "logs": mean(g["logs"])} for k, g in beside.items()}
    yield {"rows": [len(i) for i in parts.values()], "mixtures": said}
    for seed in seeds:
        yield {f"seed {seed}": judged(folder, seed, beside)}


def mean(logs: np.ndarray) -> list[float]:
    """Mean and standard error."""
    return [round(float(logs.mean()), 3), round(float(logs.std(ddof=1)) / len(logs) ** 0.5, 3)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training")
    parser.add_argument("--quick", action="store_true", help="wine alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = HERE / "results" / "tables.json"
    for name in ["wine"] if options.quick else options.only:
        with tempfile.TemporaryDirectory() as place:
            for found in compared(name, Path(place), options.seeds):
                print(json.dumps(found, indent=1), flush=True)
                known = json.loads(file.read_text()) if file.exists() else {}
                _report.write_json(file, {**known, name: {**known.get(name, {}), **found}})
