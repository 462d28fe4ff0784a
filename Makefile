# `make demo` and `make test` need nothing but Python ≥ 3.11 on Linux: both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint benchmark lock clean

demo: .venv/ready
	$(BIN)/raytrain demo

test: .venv/ready
	$(BIN)/python -m pytest -q --durations=10

lint: .venv/ready
	$(BIN)/ruff check .

benchmark: .venv/ready
	$(BIN)/python -m benchmarks.padding
	$(BIN)/python -m benchmarks.plans
	$(BIN)/python -m benchmarks.statistics
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.oomptimizer
	$(BIN)/python -m benchmarks.schedule
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.loader_memory
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.host_memory
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.rtfx --precisions fp32 bf16 int8

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raytrain needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# One resolver, pip: resolve what pyproject.toml asks for in a fresh environment and pin all of it.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q --upgrade pip
	.venv-lock/bin/python -m pip install -q 'torch==2.13.0' '.[dev]' setuptools
	.venv-lock/bin/python -m pip freeze --all --exclude raytrain --exclude pip | sed 's/+cpu$$//' | grep -v '^nvidia-[^m]\|^triton\|^cuda-' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
