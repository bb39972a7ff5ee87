# make demo       record three small trainings and analyze them (a few minutes, the install aside)
# make test       lint, format and type checks, then the tests
# make test-full  the fault tests of the log at full size, large models, four processes, slow scripts
# make bench      what recording costs, beside peers, in one run
# Needs Python >= 3.10 and make; both make a virtual environment of their own in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-full: $(VENV)/.test-installed
	$(BIN)/python -m pytest --full tests/log tests/hooks/recording/test_run_directory.py \
	  tests/hooks/gradients/test_gradient_models.py tests/distributed tests/test_sonde_run.py

bench: $(VENV)/.bench-installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/log_append.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/log_read.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/log_small.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/capture.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/capture_memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/example_gradients.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "sonde needs Python >= 3.10; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip

# PyTorch is large: the first install takes minutes, later ones seconds.
$(VENV)/.demo-installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing sonde and PyTorch (about 5 GB with CUDA, once)"
	$(BIN)/python -m pip install --editable '.[examples,tensorboard]'
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/.demo-installed
	$(BIN)/python -m pip install --group dev
	@touch $@

# Peers that do not install get a row that says so.
$(VENV)/.bench-installed: pyproject.toml | $(VENV)/.test-installed
	-$(BIN)/python -m pip install --group bench && touch $@
