# The two commands of this project: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup demo test slow lint format bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[flux,interp,cloud,data,dev]'
	@touch $@

demo: setup
	@$(BIN)/jaxdict demo

test: setup
	@$(BIN)/python -m pytest

slow: setup
	@$(BIN)/python -m pytest -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@for question in benchmarks/bench_*.py; do echo "$$question"; $(BIN)/python $$question || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info
