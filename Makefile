# Everything sets itself up in $(VENV); only Python (3.11 or newer) and make are needed.
#
#   PYTHON       the Python that makes the environment
#   VENV         where the environment is
#   CONSTRAINTS  the exact versions to install; empty: the newest ones
#   WORKDIR      where `make demo` writes
#   WORKERS      how many tests run at once
#   ARGS         more arguments for pytest, e.g. ARGS="-k packing -x"

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKDIR ?= runs/shapes
WORKERS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
# Not compiling every module ahead of time saves a third of the installation; Python compiles what it imports.
PIP_INSTALL := $(PY) -m pip install -qq --no-input --no-compile --disable-pip-version-check
PINNED := $(if $(strip $(CONSTRAINTS)),-c $(CONSTRAINTS))
# Each worker takes neighbouring tests, which share what is made once for a file.
PYTEST := JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo-setup demo test test-fast test-long torture parity lint clean

help:  ## this list
	@echo "make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

demo: demo-setup  ## train, read, draw and score on the shapes world, in runs/shapes
	@$(PY) -m pisces_jax.demo --workdir=$(WORKDIR)

test: setup  ## all tests
	@$(PY) -m ruff check .
	@$(PYTEST) $(ARGS)

test-fast: setup  ## the tests that take seconds
	@$(PYTEST) -m "not slow" $(ARGS)

test-long: setup  ## a million examples, ten thousand detections, more meshes and processes (some minutes)
	@PISCES_LONG_TESTS=1 $(PYTEST) $$(grep -l PISCES_LONG_TESTS tests/test_*.py) $(ARGS)

parity: setup  ## every part at its true shape against its reference implementation (24 GB of memory, an hour)
	@JAX_PLATFORMS=cpu $(PY) tests/parity.py $(ARGS)

torture: setup  ## kills and signals at random moments, 150 in all or ARGS=N of each kind (hours)
	@$(PY) tests/torture.py $(ARGS)

lint: setup  ## style and types
	@$(PY) -m ruff check .
	@$(PY) -m mypy

setup: $(VENV)/.test $(VENV)/.gpu-compiler  ## the environment for development (made by the other targets when they need it)

demo-setup: $(VENV)/.base  ## the environment for running only

clean:  ## remove caches and the environment; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# Each stamp is written last, so an environment that was not finished, or whose Python has gone, is made again.
ifneq ($(shell $(PY) -c "print('ok')" 2>/dev/null),ok)
.PHONY: $(VENV)/.venv
endif

$(VENV)/.venv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed and '$(PYTHON)' is not: name one, as in  make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed: install the venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PIP_INSTALL) --upgrade pip || echo "pip stays as it is (a newer one installs twice as fast)"
	@touch $@

$(VENV)/.base: setup.py $(CONSTRAINTS) | $(VENV)/.venv
	@echo "installing pisces_jax and what it needs (about half a minute)"
	@$(PIP_INSTALL) $(PINNED) -e .
	@touch $@

# The compiler for NVIDIA GPUs has a folder of its own, which the tests that compile for GPUs look into: beside the rest,
# JAX would print a traceback at every start without a driver.
JAX = $$($(PY) -c "import importlib.metadata as m; print(m.version('jax'))")

$(VENV)/.gpu-compiler: $(VENV)/.test
	@rm -rf $(VENV)/gpu-compiler
	@case "$$(uname -sm)" in "Linux x86_64") \
	  echo "installing the compiler for NVIDIA GPUs, which needs none (223 MB)"; \
	  $(PIP_INSTALL) $(PINNED) --no-deps --target $(VENV)/gpu-compiler \
    jax-cuda12-plugin==$(JAX) jax-cuda12-pjrt==$(JAX) nvidia-cuda-nvcc-cu12;; esac
	@touch $@

$(VENV)/.test: setup.py $(CONSTRAINTS) | $(VENV)/.venv
	@echo "installing pisces_jax, what it needs and what its tests need (about a minute)"
	@$(PIP_INSTALL) $(PINNED) -e '.[test]'
	@touch $(VENV)/.base $@
