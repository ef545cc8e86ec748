# Everything runs in .venv, which the first target makes and later ones reuse until pyproject.toml or constraints.txt
# changes. Needed beforehand: Python 3.11 or newer with venv and pip. Choose another one with `make PYTHON=python3.12`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
CODE := hf_plugin predictors gpu_cache cpu_experts kernels

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format bench install clean

help:
	@echo "make demo       patch a small trained model, compare its text with stock's, show the statistics"
	@echo "make test       the whole test suite (ARGS=... goes to pytest)"
	@echo "make test-fast  the suite without the tests marked slow"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff's formatter and its safe fixes"
	@echo "make bench      short runs of both benchmarks on this machine"
	@echo "make clean      remove the environment and all caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Moebius needs Python 3.11 or newer, \
	and $(PYTHON) is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/moebius demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# mypy knows nothing of the line in moebius/__init__.py that adds the five folders, so it is shown the package as the
# wheel lays it out.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/moebius
	@cd build/types/moebius && ln -s ../../../moebius/* . && for folder in $(CODE); do ln -s ../../../$$folder .; done
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/moebius bench experts --shape 64,1024,512,8 --tokens 1,4,32 --format fp32,bf16
	$(BIN)/moebius bench generate --prompt-tokens 64 --new-tokens 64 --rounds 3

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
