# `make demo` and `make test` do all the set-up; a second run reuses the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmark gpu-check clean

demo: $(VENV)/.core
	$(BIN)/python -m trimask demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	ln -sfn "$(CURDIR)" $(VENV)/trimask  # mypy wants the folder to have the package's name
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml trimask

benchmark: $(VENV)/.dev
	$(BIN)/python -m trimask.benchmarks ops
	$(BIN)/python -m trimask.benchmarks models

# Installs nothing: the machine with the GPU has a python with torch, triton and pytest.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "trimask needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# The stamps say which extras are installed; a changed pyproject.toml installs again.
$(VENV)/.core: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.core
