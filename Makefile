# make demo and make test set up their own environment in .venv, with uv when there is one.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# uv takes wheels from where pip is told to look.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
RUN_DEMO ?= runs/demo
TEST_JOBS ?= 2
SIZE ?= 1
SEED ?= 0

.PHONY: demo test torture lint bench bench-report clean

demo: $(VENV)/.core
	$(BIN)/vavae-fast demo --out $(RUN_DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest tests -n $(TEST_JOBS) --dist worksteal $(PYTEST)

# Faults, tried and counted: kills, flipped bits, full disks, …; SIZE=10 takes ten times as long, SEED=3 draws others.
torture: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture --size $(SIZE) --seed $(SEED) $(TORTURE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks $(PYTEST)

bench-report: $(VENV)/.core
	$(BIN)/vavae-fast bench-report

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(if $(shell command -v uv 2>/dev/null),uv venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

# torch first and alone: whatever depends on it must find the pinned one.
$(VENV)/.core: $(BIN)/python constraints.txt pyproject.toml
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@
