# Each target installs what it needs in .venv, once after each change of pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg
# Threads of OpenMP that wait do not keep a processor busy: two processes with two threads each share two processors.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test test-threads check arm64 perf commands docs

help:
	@echo "make demo          synthetic textile images: train, test on unseen subclasses, write a report"
	@echo "make test          all tests"
	@echo "make test-threads  the numerical tests again, with two threads"
	@echo "make check         lint, format, types, import contracts"
	@echo "make arm64         whether a line PC with an ARM processor can install everything"
	@echo "make perf          speed and memory benchmarks"
	@echo "make commands      write the command reference from the code"
	@echo "make docs          the documentation as a site"

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

.venv/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[train,clip,serve,line,genicam,postgres,openvino,align,bench,scale,s3,dev]"
	touch .venv/.train $@

demo: .venv/.train
	$(BIN)/normweave demo

# One process a core, each with one thread, files in the order of their names: files of few slow tests do not come last.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=20

# test_settings.py has no numerical result.
test-threads: .venv/.dev
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow" --ignore tests/heads/adapted_moe/test_settings.py tests/heads tests/features tests/maps tests/outcome tests/test_scoring.py tests/test_fitting.py tests/test_cross_validation.py

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

arm64: .venv/.dev
	$(BIN)/python deploy/arm64.py

perf: .venv/.dev
	set -e; for bench in perf/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

commands: .venv/.dev
	$(BIN)/python -m typer normweave.cli utils docs --name normweave --title "Command reference" --output docs/reference/commands.md

docs: .venv/.dev
	$(BIN)/mkdocs build --strict
