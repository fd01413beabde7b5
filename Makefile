# `make demo`: set up, fetch three language models, fuse them. `make test`: set up, run every test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test models setup clean

demo: models
	$(BIN)/fuselm run examples/quickstart.yaml

test: models
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

models: setup
	$(BIN)/python examples/models.py models

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs
