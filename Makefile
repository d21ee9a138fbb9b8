# make test    the whole test suite, in an environment of its own (.venv)
# make demo    train an IAPT adapter on a small language model and generate with it, in a few minutes on a CPU
# make bench   time decoding, prefill, training and import against the bare model and against LoRA
# make lint    ruff
#
# Nothing has to be installed first but Python >= 3.11. To test on the oldest supported releases:
#   make test VENV=.venv-floor CONSTRAINTS=constraints/floor.txt

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/newest.txt
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp says: these extras are installed in this environment, at these pins.
STAMP := $(VENV)/.$(basename $(notdir $(CONSTRAINTS)))

.PHONY: test demo bench lint format clean

test: $(STAMP)-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(STAMP)-examples
	$(BIN)/python examples/finetune_iapt.py $(DEMO_ARGS)

bench: $(STAMP)-examples
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

lint: $(STAMP)-ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)-ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# torch first and alone: its exact pin decides the build, before another requirement can ask for a different one.
$(STAMP)-torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.*-torch $(VENV)/.*-test $(VENV)/.*-examples
	$(PIP) install -c $(CONSTRAINTS) torch
	touch $@

$(STAMP)-test $(STAMP)-examples: $(STAMP)-%: $(STAMP)-torch pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

# The linter needs none of the package's dependencies.
$(STAMP)-ruff: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) ruff
	touch $@

clean:
	rm -rf .venv .venv-floor $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
