# Two commands for a fresh machine: `make demo` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv-newest/bin
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: setup setup-dev demo test test-slow test-faults test-newest lint clean

setup: .venv/.installed
setup-dev: .venv/.installed-dev

# Both requirements files are named in each call, so that pip never replaces the pinned torch.
.venv/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -c constraints.txt -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python $(INSTALL) -c constraints.txt -r requirements.txt -r requirements-dev.txt
	touch $@

# Trains a small model on the built-in sample and generates text with it: under three minutes on
# two CPU cores, once everything is installed.
demo: setup
	$(BIN)/python main.py --train --config demo.json
	$(BIN)/python main.py --generate --config demo.json
	@echo
	@echo "Next, your own text:  $(BIN)/python main.py --train --text-file YOUR.txt"
	@echo "then generate text:   $(BIN)/python main.py --generate --prompts 'Once upon'"

# Every test that is not marked slow.
test: setup-dev
	$(BIN)/python -m pytest -m "not slow"

# The tests that take long: the wheel, the compiler's memory, a real run against its prediction.
test-slow: setup-dev
	$(BIN)/python -m pytest -m slow

# Every fault a user can meet, in full: about nine minutes; tests/faults/RESULTS.md has the figures.
test-faults: setup-dev
	$(BIN)/python -m pytest tests/faults --full -rP

# The same tests with the newest release of every package but torch, in an environment of its own.
test-newest:
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python $(INSTALL) --upgrade -r requirements.txt -r requirements-dev.txt
	$(NEWEST)/python -m pytest -m "not slow"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf demo_output build *.egg-info .*_cache .hypothesis
