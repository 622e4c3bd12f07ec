# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all bench gpu-check format clean

demo: $(VENV)/train.installed
	$(BIN)/python -m train demo

test: $(VENV)/test.installed gpu-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist=worksteal

# Every case, every generation of TPU, and optimized programs: about an hour on two cores.
test-all: $(VENV)/test.installed gpu-check
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "slow or not slow" --hypothesis-profile=thorough

# PyTorch is among the peers. Its default Linux build holds CUDA, gigabytes that a CPU comparison has no use
# for: point pip at a CPU build's index (PIP_EXTRA_INDEX_URL), or leave it out: the results then say so.
bench: $(VENV)/bench.installed
	$(BIN)/python -m benchmarks

# The compiler for NVIDIA cards, which needs none, in a folder apart: see train/aot/cards.py. Its wheels are for
# Linux; where they cannot be had, the tests that compile for a card are skipped, and the next call tries again.
gpu-check: $(VENV)/test.installed
	@$(BIN)/python -m train.aot.install_gpu_check

format: $(VENV)/test.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(VENV)/%.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
