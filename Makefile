# Two commands on a fresh machine with Python 3.11, git and make:
#   make demo    compare six learners on real handwritten digits, print the table and the report's path
#   make test    style, types, layering and the whole test suite
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test setup clean

demo: .venv/installed
	$(BIN)/remanence run digits

test: .venv/developed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

setup: .venv/developed

# torch comes first and by itself: asked for by another package, pip would take the newest build with gigabytes of CUDA
.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/developed: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build dist
