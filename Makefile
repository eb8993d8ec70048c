# Everything a newcomer types. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help install train test test-slow reliability test-oldest golden check bench bench-gpu clean

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
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	$(PYTEST) -m slow -n 2 --dist loadfile --durations=10

reliability: install  ## what docs/reliability.md promises, in at most ten minutes
	$(PYTEST) -m reliability -n 2 --dist loadfile --durations=10

# The oldest transformers that pyproject.toml allows, with the huggingface_hub it was released with, beside the rest of .venv.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLD := build/oldest/$(OLDEST)

test-oldest: install $(OLD)/.installed  ## a folder loaded and questioned with the oldest transformers that is supported
	HF_HUB_OFFLINE=1 PYTHONPATH=$(OLD):src $(BIN)/python tests/multimodal/oldest.py $(OLDEST)

$(OLD)/.installed:
	@rm -rf $(OLD)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OLD) --no-deps transformers==$(OLDEST) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OLD) "huggingface_hub<2" || { \
		echo "make test-oldest: transformers $(OLDEST) could not be installed. It needs the package index, or pip's cache." >&2; \
		exit 1; }
	@touch $@

golden: install  ## what every shipped experiment resolves to, written anew: tests/experiments/resolved
	PYTHONPATH=src $(BIN)/python tests/experiments/shipped.py

check: install  ## lint, format, types, import floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: install  ## speed on the CPU, in under ten minutes; writes the tables of experiments/benchmarks
	@for bench in views loss injection context published_way scaling; do \
		$(BIN)/python experiments/benchmarks/$$bench.py || exit 1; echo; \
	done

# Installs nothing: a machine with a GPU has a torch of its own, for its driver, and often no network.
bench-gpu:  ## training steps of real size on one GPU, in at most ten minutes; writes gpu.md there
	$(or $(wildcard $(BIN)/python),$(PYTHON),python3) experiments/benchmarks/gpu.py

clean:  ## remove caches and build leftovers; data, outputs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +
