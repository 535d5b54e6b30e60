# The two commands of this project: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup demo test test-lowest test-newest slow lint format bench bench-peers clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[flux,interp,cloud,data,dev]'
	@touch $@

demo: setup
	@$(BIN)/jaxdict demo

# Two at a time: most of a test's time is one thread compiling. A file's tests stay together, as they share fixtures;
# files in their order, for the last of them are short ones.
test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The suite on the oldest and on the newest releases that pyproject.toml allows, each in an environment of its own.
# torch stays the one of constraints.txt; TORCH=torch takes the newest, TORCH=torch==2.6.0 the oldest.
TORCH ?= $(shell grep '^torch==' constraints.txt)

test-lowest test-newest: test-%: .venv-%/.ready
	@.venv-$*/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

.venv-lowest/.ready: RESOLUTION = lowest-direct
.venv-newest/.ready: RESOLUTION = highest
.venv-lowest/.ready .venv-newest/.ready: .venv-%/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv-$* (a few minutes the first time)"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv '$(TORCH)'
	@.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) '$(TORCH)' --editable '.[flux,interp,cloud,data,dev]'
	@touch $@

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
	@for question in $(filter-out %_peers.py,$(wildcard benchmarks/bench_*.py)); do echo "$$question"; $(BIN)/python $$question || exit 1; done

# Other libraries beside ours, in an environment of their own. ARGS="--quick" tries it out.
bench-peers: setup .venv-peers/.ready
	@$(BIN)/python benchmarks/bench_sae_peers.py $(ARGS)

.venv-peers/.ready: benchmarks/peers/requirements.txt
	@echo "Setting up .venv-peers (a few minutes the first time)"
	@$(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< torch
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-peers runs build *.egg-info
