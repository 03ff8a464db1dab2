# On a machine with only python3 (3.11 or newer) and make:
#   make demo    sets up, then trains a controller and compares it on text it never saw
#   make test    sets up, then lint, types and tests
#   make setup   only installs, into .venv
# TORCH_INDEX names the index of torch's CPU builds, used where torch would otherwise bring CUDA.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed

.PHONY: setup demo test soak lint clean help

help:
	@sed -n '2,4s/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else "metactl needs Python 3.11 or newer, got " + v + "; set PYTHON=...")'
	@echo "setup: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch"
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	    $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt torch; \
	elif $(BIN)/python -m pip install -qq --dry-run --report - --constraint constraints.txt torch \
	        | grep -q '"name": "nvidia-'; then \
	    echo "setup: no GPU here, so the CPU build from $(TORCH_INDEX)"; \
	    $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt torch --index-url $(TORCH_INDEX); \
	else \
	    $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt torch; \
	fi
	@echo "setup: installing metactl and what it needs"
	@$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # pip takes one core
	@touch $(STAMP)
	@echo "setup: done"

demo: $(STAMP)
	@echo "demo: train a controller, apply it to new runs, compare (about 5 minutes on 2 cores)"
	@$(BIN)/metactl demo --run-dir runs/demo

lint: $(STAMP)
	@echo "test: lint and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --num-workers 2

test: lint
	@echo "test: the suite"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

soak: $(STAMP)
	@echo "soak: clusters that lose workers, nodes, drivers and their disk; populations (minutes)"
	@$(BIN)/python -m pytest -m soak

clean:
	rm -rf $(VENV)
