# One environment, two depths: what `offramp` needs to run, and what its developers need as well.
# The stamp files remember which of the two is installed, so a second `make` costs nothing.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.stamp-run  ## install what a run needs, then run the demo
	@$(BIN)/offramp demo

# Two processes of one thread each are faster than one of two: toy models are too small to share.
test: $(VENV)/.stamp-dev  ## run the fast tests (add flags: PYTEST_FLAGS="-x -k exits")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

test-all: $(VENV)/.stamp-dev  ## run the slow tests too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not peer" $(PYTEST_FLAGS)

check: $(VENV)/.stamp-dev  ## lint, format, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A VENV without pyvenv.cfg is not an environment, so it is not ours to delete.
clean:  ## delete the environment, caches and build results
	@[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, at the pinned version: pip then takes a CPU build where the machine
# offers one, and the next install finds torch settled.
$(VENV)/.stamp-run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Offramp needs Python 3.11 or newer; try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) (once; a few minutes; 1.1 GB on disk, nearly all of it torch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	@echo "Installing the test and lint tools into $(VENV) ..."
	@$(PIP) -e ".[dev]"
	@touch $@
