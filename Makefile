# On a fresh machine `make demo` and `make test` are all there is to type: each makes .venv when it is missing or out of date.
#
#   make demo   DATA_DIR=folder      compress a real encoder, with GLUE's TSV files from a folder (else the hub, else generated data)
#   make test   TESTS="tests/test_shapes.py"
#   make bench                       pytest-benchmark, with the systems we compare with
#
# PyPI's torch for Linux brings CUDA along (about 2.5 GB). A machine without a GPU does well with
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# which prefers torch 2.13.0+cpu, or with `--index-url` in place of it for a mirror that holds everything.

PYTHON ?= python3
PIP_FLAGS ?=
DATA_DIR ?=
OUTPUT ?= runs/demo
TESTS ?= tests
WORKERS ?= 2
THREADS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev,demo]"
	touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[dev,demo,bench]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/kronbert demo --output "$(OUTPUT)" $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

# Workers of one thread each: a file's tests stay in one, and share what the file has made.
test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(if $(DATA_DIR),KRONBERT_DATA_DIR="$$(cd "$(DATA_DIR)" && pwd)") \
		$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --ignore=tests/benchmarks $(TESTS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(BIN)/python -m pytest -q tests/benchmarks

clean:
	rm -rf build dist runs .benchmarks .mypy_cache .pytest_cache .ruff_cache .coverage ./*.egg-info $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
