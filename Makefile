# The commands of this project. `make demo` and `make test` need only Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Numeric code uses the cores itself; test processes beside each other must not each take all of them.
TEST_WORKERS ?= 2

# Whose pins `make test-pinned` runs in: llava, or llava_next.
PINS ?= llava
PINNED := .venv-pinned/$(PINS)
DEEPSPEED_llava := 0.12.6
DEEPSPEED_llava_next := 0.14.4
# Those of training are not among them, nor those that only newer libraries can run: NaFlex, adapters of peft.
CORE_TESTS := tests/parity tests/integration/test_llava.py $(patsubst %,tests/unit/test_%.py,\
	any_size catalogue config device_map dual_encoder encoder export extract fused layer_modules layouts \
	llava_files metrics multiscale picture_list plugin preprocess projectors projectors_attention prompts \
	registry search text_embeddings tiling tower tower_modes verify weights zero_shot)

.PHONY: setup demo test test-pinned check clean

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

# The core among the libraries of LLaVA's time. DeepSpeed builds nothing here, and wants to see torch.
test-pinned: $(PINNED)/.installed
	OMP_NUM_THREADS=1 $(PINNED)/bin/python -m pytest $(CORE_TESTS)

$(PINNED)/.installed: pyproject.toml tests/pinned/$(PINS).txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' || { echo "torch 2.1.2 needs Python 3.10 or 3.11: make test-pinned PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(PINNED)
	$(PINNED)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/pinned/$(PINS).txt --editable .
	DS_BUILD_OPS=0 $(PINNED)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==$(DEEPSPEED_$(PINS))
	$(PINNED)/bin/python -m pip check
	touch $@

# Static checkers follow folders, not package-dir: these git-ignored links show them the whole package. They
# go whatever comes of it, since an installation would take them for folders of the package.
LINKS := vlm_vision/adapters vlm_vision/train
check: setup
	trap 'rm -f $(LINKS)' EXIT; ln -sfn ../adapters ../train vlm_vision && \
	$(BIN)/ruff format --check . && \
	$(BIN)/ruff check . && \
	$(BIN)/mypy --package vlm_vision && \
	$(BIN)/python -m pytest tests/unit/test_imports.py

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
