# The commands of this project. `make demo` and `make test` need only Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Numeric code uses the cores itself; test processes beside each other must not each take all of them.
TEST_WORKERS ?= 2

.PHONY: setup demo test check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/vlm-vision demo --output runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

# Static checkers follow folders, not package-dir: these git-ignored links show them the whole package.
check: setup
	ln -sfn ../adapters vlm_vision/adapters
	ln -sfn ../train vlm_vision/train
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --package vlm_vision
	$(BIN)/python -m pytest tests/unit/test_imports.py
	rm -f vlm_vision/adapters vlm_vision/train

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
