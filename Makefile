# `make quickstart` and `make test` set up all they need in .venv, from Python alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
# A file's tests share what they have trained: they stay on one core, with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: quickstart test check format clean

quickstart: $(VENV)/.runtime           ## train a small model with latent thoughts on this machine's own text
	$(BIN)/lattice run recipes/quickstart.toml

test: $(VENV)/.dev                     ## all tests, on all cores
	$(PYTEST)

check: $(VENV)/.dev                    ## format, lint, types, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: $(VENV)/.dev                   ## mend format and lint where it can be done by machine
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:                                 ## the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
