# Two commands for users: `make demo` and `make test`. Each makes its own .venv from pinned versions.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow style clean

demo: $(STAMP)
	$(BIN)/python demo_cada.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

style: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(STAMP): constraints.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
