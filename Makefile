# make demo   everything, on a fresh machine: environment, export, proof, report
# make test   the tests          make check  lint, types and tests, as CI runs them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each worker has one thread (tests/conftest.py) and up to 3 GB; a file's tests share their fixtures.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Pinned first, so that no other package pulls in a build of torch with gigabytes of CUDA.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.*"
	$(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	# Test oracles. timm asks for torchvision, whose only build asks for CUDA's torch: no dependencies.
	$(BIN)/python -m pip install --quiet --no-deps "timm>=1.0.22,<1.1" "torchvision==0.29.*"
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fastvlm-export --target onnx --out out/demo --force

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -s --timeout 3600

# On a machine with an NVIDIA GPU: engines loaded, run, timed and held against PyTorch.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -n 0 -s --timeout 3600 tests/gpu

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

.PHONY: install demo test test-slow test-gpu check
