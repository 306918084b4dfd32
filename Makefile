# Every target makes what it needs first: a fresh clone needs nothing but `make demo`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint test-gpu clean

PYTHON ?= python3
VENV := .venv
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
# Where this is set, every process of a run or a test compiles torch, Ray and Optuna again.
unexport PYTHONDONTWRITEBYTECODE
# Without --no-compile pip compiles every file of torch and Ray; Python compiles the few that are used.
INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## A search on this machine in minutes: run, inspect, export a winner, let it write text
	@rm -rf experiments/demo.previous
	@if [ -e experiments/demo ]; then \
		echo "keeping the earlier demo as experiments/demo.previous"; \
		mv experiments/demo experiments/demo.previous; fi
	$(BIN)/archsearch run --space search_spaces/tiny.yaml --out experiments/demo
	$(BIN)/archsearch inspect experiments/demo
	$(BIN)/archsearch export experiments/demo --to experiments/demo/best
	$(BIN)/python examples/generate.py experiments/demo/best

test: $(VENV)/.dev ## All tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-gpu: $(VENV)/.cuda ## The tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict --allow-untyped-calls --follow-imports=silent archsearch/*.py archsearch/operators archsearch/search archsearch/commands archsearch/validity

clean: ## Remove the environment and all caches (never experiments)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find archsearch tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "setting up $(VENV): once, for some minutes"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.cuda: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev,cuda]'
	@touch $@ $(VENV)/.dev $(VENV)/.run
