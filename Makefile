# make train: an autoencoder on real images from a bare checkout. make test: everything that is tested.
# Each does its own set-up, once.
PYTHON ?= python3
BIN := .venv/bin
# Files side by side, three on two cores: most of a test's time is waiting for processes that start. A worker that died
# is not replaced: the others would wait for ever for what it had been given.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: train test test-fast test-long test-gpu fuzz lint bench

train: .venv/installed
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml --num_cpu_threads_per_process 1 -m dist_ae train ae

test: .venv/installed-for-test
	$(PYTEST) -m "not long and not gpu"

# The loop to live in: no clusters, no kills, no installed wheels.
test-fast: .venv/installed-for-test
	$(PYTEST) -m "not long and not gpu and not slow"

test-long: .venv/installed-for-test
	$(BIN)/python -m pytest -m long

# What needs CUDA, a line a test; elsewhere one line says that it was skipped.
test-gpu: .venv/installed-for-test
	$(BIN)/python -m pytest -m gpu -v -rs --tb=short tests/test_gpu.py || [ $$? -eq 5 ]

fuzz: .venv/installed-for-test
	$(BIN)/python tests/fuzz.py --cases 500

lint: .venv/installed-for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests examples/own_model.py
	$(BIN)/mypy --config-file tests/mypy.ini --explicit-package-bases benchmarks/*.py

bench: .venv/installed-for-bench
	$(BIN)/python -m benchmarks.speed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-for-test: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@ .venv/installed

.venv/installed-for-bench: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@ .venv/installed .venv/installed-for-test
