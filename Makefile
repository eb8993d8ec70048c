# Everything a newcomer types. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help install train test test-slow check bench clean

# The first interpreter that really runs (a version manager's shim may exist and fail), is 3.11 or 3.12, and can make a
# virtual environment. Name another with `make PYTHON=...`.
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	"$$p" -c "$(USABLE)" >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Shapes and dtypes in signatures are checked while the tests run, never in production.
TYPED := deepstack_pl.batch,deepstack_pl.stacking,deepstack_pl.vision,deepstack_pl.language,deepstack_pl.multimodal
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --jaxtyping-packages=$(TYPED),beartype.beartype

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the package, at the versions of constraints.txt

# The stamp, not the folder, says that an install was completed, and for which requirements.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		python="$(PYTHON)"; \
		"$$python" -c "$(USABLE)" >/dev/null 2>&1 || { \
			echo "make install: needs Python 3.11 or 3.12 with venv, and '$$python' is none. Name one: make PYTHON=..." >&2; \
			exit 1; }; \
		"$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

train: install  ## data, training, evaluation, report: python train.py
	$(BIN)/python train.py

test: install  ## the test suite, offline
	$(PYTEST) -m "not slow" -n 2 --dist loadfile --durations=10

test-slow: install  ## the tests that train
	$(PYTEST) -m slow --durations=10

check: install  ## lint, format, types, import floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: install  ## preprocessing against the published path, on one core; writes experiments/benchmarks/views.md
	$(BIN)/python experiments/benchmarks/views.py

clean:  ## remove caches and build leftovers; data, outputs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +
