# Everything runs from .venv, which `make setup` builds from the pins in requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
# Tests run in parallel, one per core; each worker computes on one thread.
WORKERS ?= auto
TEST := OMP_NUM_THREADS=1 python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo playground test test-slow test-faults test-published test-gpu coverage site lint format setup clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: setup  ## train on handwritten digits, raw images to metrics: 5 minutes on 2 CPU cores, 11 without AVX-512
	dvc repro
	@echo "look at data/samples/grid.png and data/evaluation/metrics.json"

playground: setup  ## serve a page to play with the digits model that ships with this repository
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.txt --editable '.[dev,playground]'
	ear playground models/digits.safetensors

test: $(BIN)/.test-ready  ## run the default tests, on all cores
	$(TEST)

test-slow: $(BIN)/.test-ready  ## run the tests marked slow: full-length pipelines, minutes each
	$(TEST) -m slow

test-faults: setup  ## inject faults into the real pipeline, at most 10 minutes; FULL=1: all of docs/reliability.md, resumable
	python -m tests.faults $(if $(FULL),--full --page)

test-published: setup  ## score a generated EAR-B checkpoint with the real file names and formats: 15 minutes on 2 CPU cores
	python -m tests.rehearsal

test-gpu: $(BIN)/.test-ready  ## run the tests that need a CUDA device
	python -m pytest -q -m gpu

coverage: $(BIN)/.test-ready  ## run the default tests and report the covered lines of ear/ (at least 95%)
	rm -f .coverage .coverage.*
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml COVERAGE_FILE=$(CURDIR)/.coverage $(TEST) --cov --cov-report=term:skip-covered

site: $(BIN)/.test-ready  ## build the pages of docs/ as a site: site/index.html
	mkdocs build --strict

lint: $(BIN)/.test-ready  ## check style, formatting, types, imports between packages, the Dockerfile
	ruff check .
	ruff format --check .
	lint-imports
	mypy
	hadolint Dockerfile

format: setup  ## format the code and sort its imports
	ruff check --fix .
	ruff format .

setup: $(BIN)/.ready  ## build .venv (5.7 GB) from the pinned requirements
$(BIN)/.ready: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ear needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.txt --editable '.[dev]'
	$(BIN)/python -m ear.display.plots_page
	touch $@

# Optional parts of ear that the tests use, and a browser for its pages; without one, tests of pages are skipped.
$(BIN)/.test-ready: $(BIN)/.ready
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.txt --editable '.[dev,test]'
	command -v chromium || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; } || true
	touch $@

SCRATCH := fetch prepare reference tokenizer reconstruct cache train finetune sample evaluate experiments logs times watch
clean:  ## delete scratch of stages, when none runs, and local Prefect state; never results, kept checkpoints or studies
	rm -rf $(SCRATCH:%=work/%)
	rm -rf .prefect .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
