# make train: an autoencoder on real images from a bare checkout. make test: everything that is tested. Each does its own set-up, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-long lint bench

train: .venv/installed
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml --num_cpu_threads_per_process 1 -m dist_ae train ae

test: .venv/installed-for-test
	$(BIN)/python -m pytest -m "not long"

test-long: .venv/installed-for-test
	$(BIN)/python -m pytest -m long

lint: .venv/installed-for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-for-bench
	$(BIN)/python -m benchmarks.speed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-for-test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@ .venv/installed

.venv/installed-for-bench: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@ .venv/installed .venv/installed-for-test
