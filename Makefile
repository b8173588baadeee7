# `make train` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny
# A JAX to test with, such as JAX=jax==0.10.2; empty: the newest that this Python has.
JAX ?=

.PHONY: train test lint

train: $(VENV)/installed
	$(VENV)/bin/python -m train --config=configs/gpt_tiny.py --workdir=$(WORKDIR)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet -e . $(JAX)
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet -e '.[test]' $(JAX)
	touch $@ $(VENV)/installed
