# Two commands for a fresh machine: `make demo` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup setup-dev demo test test-faults lint clean

setup: .venv/.installed
setup-dev: .venv/.installed-dev

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# A small model of the built-in sample, and what it writes; under six minutes on two CPU cores.
demo: setup
	$(BIN)/python main.py --train --config demo.json
	$(BIN)/python main.py --generate --config demo.json
	@echo
	@echo "Next, your own text:  $(BIN)/python main.py --train --text-file YOUR.txt"
	@echo "then let it write:    $(BIN)/python main.py --generate --prompts 'Once upon'"

test: setup-dev
	$(BIN)/python -m pytest

# Every fault a user can meet, in full: about nine minutes; the figures are in RESULTS.md there.
test-faults: setup-dev
	$(BIN)/python -m pytest tests/faults --full -rP

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
