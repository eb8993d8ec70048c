# Everything a newcomer types. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help install train test test-slow reliability test-oldest test-newest golden check bench bench-gpu drill clean

# The first interpreter that really runs (a version manager's shim may exist and fail), is 3.11 or 3.12, and can make a
# virtual environment. Name another with `make PYTHON=...`.
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	"$$p" -c "$(USABLE)" >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints.txt
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
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" -c $(CONSTRAINTS)
	@touch $@

train: install  ## data, training, evaluation, report: python train.py
	$(BIN)/python train.py

test: install  ## the test suite, offline
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | grep -E '^(torch|transformers|lightning)=='
	$(PYTEST) -m "not slow" -n 2 --dist loadfile --durations=10

test-slow: install  ## the tests that train
	$(PYTEST) -m slow -n 2 --dist loadfile --durations=10

reliability: install  ## what docs/reliability.md promises, in at most ten minutes
	$(PYTEST) -m reliability -n 2 --dist loadfile --durations=10

# The same suite with other releases of torch and transformers, each in an environment of its own below build/; everything
# that does not come with these two stays as in constraints.txt.
MOVED := torch|torchvision|triton|nvidia-.*|cuda-.*|transformers|tokenizers|huggingface_hub|hf-xet
FLOOR = $(shell sed -n 's/.*"$(1)>=\([0-9.]*\)".*/$(1)==\1/p' pyproject.toml)

test-oldest:  ## the test suite with the oldest torch and transformers that pyproject.toml allows
	@mkdir -p build && { grep -viE '^($(MOVED))==' constraints.txt; printf '%s\n' $(call FLOOR,torch) $(call FLOOR,transformers); } >build/oldest.txt
	$(MAKE) test VENV=build/oldest CONSTRAINTS=build/oldest.txt

test-newest:  ## the test suite with the newest there are
	@mkdir -p build && grep -viE '^($(MOVED))==' constraints.txt >build/newest.txt
	$(MAKE) test VENV=build/newest CONSTRAINTS=build/newest.txt

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

drill: install  ## kill -9, full disks, fuzzing and a soak, by hand, in three hours; writes the tables of experiments/drill
	@for drill in kills full_disk fuzz soak; do $(BIN)/python experiments/drill/$$drill.py || exit 1; echo; done

clean:  ## remove caches and build leftovers; data, outputs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +
