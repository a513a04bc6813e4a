# Two commands to start with: `make demo` trains the example language model, `make test` runs
# the tests. Each sets up .venv first, once. `make help` lists the rest.

PYTHON ?= python3
CONFIG ?= examples/configs/alibi.yaml
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS = $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help venv demo docs docs-serve test test-sweeps test-site browser test-models test-npu test-gpu dist test-dist lint format bench bench-gpu clean clean-venv

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

venv: $(READY) ## set up .venv (every other target does so by itself)

# The stamp is touched last: a set-up that was interrupted is taken up again by the next make.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "attnkit needs Python 3.10 or newer, and '$(PYTHON)' was not found." \
	         "Install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "attnkit needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	         "Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	    rm -rf .venv; \
	    echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setting up .venv (once; torch is a large download)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train a small language model on the text of Python's own documentation
	$(BIN)/python examples/train_lm.py --config $(CONFIG)

test: $(READY) ## the tests, doctests included (minutes)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not sweep and not browser"

test-sweeps: $(READY) ## the tests that go through everything of a kind (minutes more)
	$(BIN)/python -m pytest -n $(WORKERS) -m sweep tests

test-site: $(READY) browser ## what is made for browsers, looked at in a headless Chromium
	$(BIN)/python -m pytest -m browser tests/site

browser: ## install Chromium where there is none (Debian and Ubuntu, as root)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

test-models: $(READY) ## models of transformers against eager attention, a chosen set (minutes)
	$(BIN)/python -m tests.zoo --chosen --strict --workers $(WORKERS)

test-npu: $(READY) ## the ascend backend through the real torch_npu, its kernels emulated (Linux, gcc)
	$(BIN)/python tests/npu/rig.py

# Exit code 3 is the doctor's word for a device that is not there: a line says so, nothing failed.
test-gpu: $(READY) ## the doctor's suite on a CUDA device (backends cuda, flex, tiled, reference)
	@$(BIN)/python -m attnkit doctor --device cuda || test $$? -eq 3

# Not --quiet: mkdocs counts no warning then, and strict mode would let every dead link pass.
docs: $(READY) ## the site, into build/site; open build/site/index.html, no server is needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(READY) ## the site while you write, on http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

dist: $(READY) ## a source distribution and a wheel, into dist/
	$(BIN)/python -m tests.release

test-dist: $(READY) ## the same, and each installed into a clean environment and used there
	$(BIN)/python -m tests.release --try

lint: $(READY) ## ruff and mypy --strict, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## run every script in benchmarks/ (about an hour) and write benchmarks/RESULTS.md
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	$(BIN)/python benchmarks/_report.py

bench-gpu: $(READY) ## a quarter of an hour on a CUDA device: benchmarks/results/gpu.md
	$(BIN)/python benchmarks/gpu.py

clean: ## remove what builds, tests and runs left behind
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-venv: ## remove .venv as well
	rm -rf .venv
