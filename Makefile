# make train: train a small mixture of experts on this machine.   make test: lint, type-check, run every test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint format docs benchmarks clean

train: $(VENV)/core
	$(BIN)/dmoe train $(ARGS)

# A process a core, files of tests in turn, each with one thread.
test: lint
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs the code blocks of README.md and docs/, and checks their links.
docs: $(VENV)/dev
	$(BIN)/python -m pytest tests/docs $(ARGS)

benchmarks: $(VENV)/core
	$(BIN)/dmoe bench layer --json benchmarks/out/layer.json
	$(BIN)/python benchmarks/dense_vs_moe.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("dmoe needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

# The stamps are files of the environment, so that removing it removes them.
$(VENV)/core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/core
