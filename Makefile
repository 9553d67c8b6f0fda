ALLOWED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# the first that runs and is of a version that pyproject.toml allows; nothing when there is none
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(ALLOWED)' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-long clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "p2ptrain needs Python 3.11, 3.12 or 3.13, and finds none;" \
		"with one elsewhere: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(ALLOWED)' || { echo "p2ptrain needs Python 3.11, 3.12 or 3.13," \
		"and $(PYTHON) is not one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) makes no virtual environments;" \
		"Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing p2ptrain and what it needs into $(VENV); the first time takes some minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

venv: $(BIN)/python  ## create .venv

install: $(STAMP)  ## install p2ptrain, with its pinned dependencies, into .venv

demo: $(STAMP)  ## train a swarm of three peers on this machine
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## lint, format, types, layers and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy p2ptrain
	MYPYPATH=scripts/bench:scripts $(BIN)/mypy --explicit-package-bases scripts
	$(BIN)/lint-imports --no-logo
	@# Real peers share the cores that they are timed on, so few of their tests run at a time. Rounds that are simulated
	@# have a clock of their own: beside them, at the lowest priority, they take what waiting peers leave of the cores.
	code=0; $(BIN)/pytest --numprocesses logical --maxprocesses 4 --ignore tests/unit/rounds tests/docs tests/unit \
		|| code=$$?; \
		nice -n 19 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --timeout 1500 -m 'not long' tests/simulation \
		tests/unit/rounds \
		> .simulation.log 2>&1 & simulation=$$!; trap "kill $$simulation 2> /dev/null" EXIT; \
		$(BIN)/pytest --numprocesses logical --maxprocesses 2 --dist loadfile -m 'not long' tests/swarm || code=$$?; \
		wait $$simulation || code=$$?; cat .simulation.log; exit $$code

test-long: $(STAMP)  ## the tests that take too long for each change
	$(BIN)/pytest -m long tests/swarm tests/simulation

clean:  ## remove the virtual environment, compiled loops and the demo's output
	rm -rf $(VENV) demo-output
	find p2ptrain -name __pycache__ -prune -exec rm -rf {} +
