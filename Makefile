# The environment is made in .venv, once, and again when the dependencies change.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Tests that run at once, one thread each; those of several ranks start more.
JOBS ?= 2
STAMP = $(VENV)/.installed

.PHONY: help pretrain test quick check format golden bench

help:  ## what can be asked for (the default)
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

pretrain: $(STAMP)  ## the main job on drawn scenes: accelerate launch pretrain/run.py --task byol
	$(BIN)/accelerate launch pretrain/run.py --task byol

test: $(STAMP)  ## every test that needs no GPU, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist worksteal

quick: $(STAMP)  ## the tests that take under two minutes
	$(BIN)/python -m pytest

check: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## ruff's formatter and its safe mends
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP)  ## record tests/golden again (and write a line in LOG.md)
	$(BIN)/python -m tests.record_golden

bench: $(STAMP)  ## the benchmarks that need nothing but this checkout
	$(BIN)/python -m benchmarks.loop_cost
