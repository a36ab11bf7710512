PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/installed
	$(BIN)/python -m rad rad/pretrained/examples/hex_nut_scratch.png --output outputs/heatmap.png || test $$? -eq 3
	@echo "The page opens at http://127.0.0.1:7860 (stop it with Ctrl+C)."
	$(BIN)/python app.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n logical --dist loadfile  # a file on each core

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -e ".[test]"
	touch $@
