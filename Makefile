# `make demo` and `make test` need nothing but Python ≥ 3.11 on Linux: both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint benchmark lock clean

demo: .venv/ready
	$(BIN)/raytrain demo

# Tests that share one Ray wait for it much of the time, so the others run beside them; their output comes at the end.
PYTEST := $(BIN)/python -m pytest -q --durations=10
OTHERS := .pytest-others.log

test: .venv/ready
	@$(PYTEST) -m 'not ray and not gpu and not slow' > $(OTHERS) 2>&1 & others=$$!; \
	trap "kill $$others" INT TERM; \
	$(PYTEST) -m 'ray and not gpu and not slow'; failed=$$?; \
	wait $$others || failed=1; cat $(OTHERS); exit $$failed

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: .venv/ready
	$(BIN)/python -m benchmarks.padding
	$(BIN)/python -m benchmarks.plans
	$(BIN)/python -m benchmarks.statistics
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.oomptimizer
	$(BIN)/python -m benchmarks.probing
	$(BIN)/python -m benchmarks.schedule
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.loader_memory
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.host_memory
	$(BIN)/python -m benchmarks.reduction
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
	.venv-lock/bin/python -m pip freeze --all --exclude raytrain --exclude pip | sed 's/+cpu$$//' | grep -v '^nvidia-[^m]\|^cuda-' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .pytest-others.log .pytest_cache .ruff_cache build *.egg-info
