PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv install demo test clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "p2ptrain needs Python 3.11, found %d.%d; try: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing p2ptrain and what it needs into $(VENV); the first time takes some minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

venv: $(BIN)/python  ## create .venv

install: $(STAMP)  ## install p2ptrain, with its pinned dependencies, into .venv

demo: $(STAMP)  ## train a swarm of three peers on this machine
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## lint, format, types and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy p2ptrain
	$(BIN)/pytest

clean:  ## remove the virtual environment, compiled loops and the demo's output
	rm -rf $(VENV) demo-output
	find p2ptrain -name '*.nb[ic]' -delete
