# make demo   the whole job on a synthetic world, minutes on two cores
# make test   every check and every test
# Each target sets up its own .venv (Python 3.11 to 3.13) and is quick the second time.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	  $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  && { echo $$p; break; }; done)
BIN := .venv/bin
UV_VERSION := 0.13.9

# Workers import torch once per process; more OpenMP threads than cores only make them wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test s3-test check format bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed (on Debian: python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# uv installs these packages in a tenth of pip's time; where it cannot, pip does the same.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)" \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/hedwig demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

# Against a real object store: set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; skipped without.
s3-test: setup
	$(BIN)/pytest -m s3 tests/test_s3.py

bench: setup
	$(BIN)/python -m hedwig.benchmark

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
