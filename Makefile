# Each verb sets up what it needs in .venv, once for each change of pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: help demo test check perf docs

help:
	@echo "make demo    textile images with planted defects: train, test on unseen subclasses, write a report"
	@echo "make test    all tests"
	@echo "make check   lint, format, types, who may import whom"
	@echo "make perf    how fast, and how much memory"
	@echo "make docs    the documentation as a site"

.venv/.train: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

.venv/.dev: pyproject.toml .venv/.train
	$(BIN)/python -m pip install -e ".[train,clip,serve,postgres,openvino,bench,dev]"
	touch $@

demo: .venv/.train
	$(BIN)/normweave demo

test: .venv/.dev
	$(BIN)/python -m pytest

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

perf: .venv/.dev
	set -e; for bench in perf/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

docs: .venv/.dev
	$(BIN)/mkdocs build --strict
