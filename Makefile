# `make demo` and `make test` need nothing but Python >= 3.10 and a network: each makes the virtual environment,
# installs what it needs and runs. Settings: make test PYTHON=python3.12 JOBS=4 PYTEST_ARGS="-m slow"
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
SLIDES_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test pytest lint format docs slides notebooks bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/data.stamp ## train a score network on digits, draw new ones, judge them
	$(BIN)/sde-gen demo $(DEMO_ARGS)

test: lint pytest ## lint, types, tests, doctests, the README's code

# One thread a worker: two workers of one thread each are faster than one of two.
pytest: $(VENV)/dev.stamp ## tests, doctests, the README's code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp ## ruff and mypy, which change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## ruff, which mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.stamp ## the documentation, in docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

slides: $(VENV)/docs.stamp ## slides of the notebooks, in docs/_build/slides
	$(BIN)/python docs/slides.py $(SLIDES_ARGS)

notebooks: $(VENV)/notebooks.stamp $(VENV)/dev.stamp ## run every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --numprocesses $(JOBS) notebooks/*.ipynb

bench: $(VENV)/bench.stamp ## run every benchmark
	set -e; for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script $(BENCH_ARGS); done

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist demo docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sde_gen needs Python >= 3.10: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# $(VENV)/NAME.stamp: the package with its extra NAME is installed, by the files named here.
$(VENV)/%.stamp: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time it takes a minute or more, as PyTorch is large."
	$(INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/bench.stamp: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[bench]'
	$(INSTALL) --no-deps k-diffusion
	@touch $@
