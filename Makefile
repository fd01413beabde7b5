# `make demo`: set up, fetch three language models, fuse them. `make test`: set up, run every test.
# `make results`: the experiments of examples/study.yaml, hours of them, into docs/study.md; again, it goes on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test results models setup clean

demo: models
	$(BIN)/fuselm run examples/quickstart.yaml

test: models
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

results: models
	$(BIN)/fuselm study examples/study.yaml
	mkdir -p docs/figures
	cp runs/study/results.md docs/study.md
	cp runs/study/figures/*.svg docs/figures/

models: setup
	$(BIN)/python examples/models.py models

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs
