# Everything runs from .venv, which `make setup` builds from the pins in requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

.PHONY: demo test test-slow test-gpu lint setup clean
demo: setup  ## raw digits to metrics, on 2 CPU cores in minutes
	dvc repro
	@echo "look at data/samples/grid.png and data/evaluation/metrics.json"

test: setup  ## the default tests
	python -m pytest -q

test-slow: setup  ## full-length runs of the pipeline
	python -m pytest -q -m slow

test-gpu: setup  ## what needs a CUDA device
	python -m pytest -q -m gpu

lint: setup
	ruff check .
	ruff format --check .

setup: $(BIN)/.ready
$(BIN)/.ready: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ear needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.txt --editable '.[dev]'
	touch $@

clean:  ## scratch of unfinished stages and local workflow state; never results
	rm -rf work .prefect
