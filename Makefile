# make demo   everything, on a fresh machine: environment, export, proof, report
# make test   the tests          make check  lint, types and tests, as CI runs them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/lock.txt
# Each worker has one thread and up to 3 GB; tests/groups.py says what runs on one worker, and when.
WORKERS := -n 2
PYTEST := $(BIN)/python -m pytest $(WORKERS)

$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip check
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fastvlm-export --target onnx --out out/demo --force

test: $(STAMP)
	$(PYTEST)

# Without whole exports of the trained model.
test-fast: $(STAMP)
	$(PYTEST) -m "not e2e and not slow"

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

# Resolve every dependency anew into the lock file. `make lock UPGRADE=` keeps the versions it has.
UPGRADE ?= --upgrade
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "uv>=0.13,<0.14"
	$(BIN)/python -m uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11 \
		--fork-strategy fewest --extra all --extra dev --no-emit-index-url \
		--custom-compile-command "make lock" --output-file $(LOCK) pyproject.toml

# The tests with the oldest direct dependencies that pyproject.toml allows, and with the newest, each
# in an environment of its own. Both take TESTS, such as TESTS=tests/targets.
RESOLUTION_oldest := lowest-direct
RESOLUTION_newest := highest
TESTS ?=
check-oldest check-newest: check-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet "uv>=0.13,<0.14"
	.venv-$*/bin/python -m uv pip compile --quiet --upgrade --resolution $(RESOLUTION_$*) \
		--extra all --extra dev --no-header --annotation-style line \
		--output-file .venv-$*/resolved.txt pyproject.toml
	.venv-$*/bin/python -m pip install --quiet --requirement .venv-$*/resolved.txt
	.venv-$*/bin/python -m pip install --quiet --no-deps --editable .
	@echo "The $* direct dependencies:"
	@sed -n 's/ *# via.*fastvlm-export.*//p' .venv-$*/resolved.txt
	.venv-$*/bin/python -m pytest $(WORKERS) $(TESTS)

.PHONY: install demo test test-fast test-slow test-gpu check lock check-oldest check-newest
