# Every target makes the virtual environment first, so a fresh clone needs python3 (3.11+) and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := 2.13.0
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

export OMP_NUM_THREADS ?= $(JOBS)
# Threads that wait asleep leave the cores to whoever else computes.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-parallel test-slow train-tiny lint format bench clean install
help:
	@echo "make demo        run every task on unseen scenes, write out/demo/index.html"
	@echo "make test        the test suite"
	@echo "make test-parallel  the long proofs on several processes: layouts, kills, resharding"
	@echo "make train-tiny  train focus_tiny from nothing, all stages; a second call resumes"
	@echo "make lint        ruff and mypy"
	@echo "make bench       measure the operators"
	@echo "make clean       remove caches, build/ and out/; the environment and runs/ stay"

install: $(STAMP)

# The CPU build of torch comes first, from wherever it can be had: the configured index, PyTorch's own
# index, or (macOS) the plain wheel. The constraints then keep it as it is.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV), once; this takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install "torch==$(TORCH)"
	@$(PIP) install -c constraints.txt "setuptools>=77"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/focus demo --out out/demo

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

# Four processes share the cores: one test at a time.
test-parallel: export OMP_NUM_THREADS = 1
test-parallel: $(STAMP)
	$(BIN)/python -m pytest tests/parallel -m "slow and not gpu"

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

train-tiny: $(STAMP)
	$(BIN)/focus train focus_tiny

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m bench kernels

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
