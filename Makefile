# `make demo`: set up, fetch three language models, fuse them. `make test`: set up, run every test.
# `make docs`: build the documentation's site into site/.
# `make results`: all experiments that docs/measured.tar.xz has not, many hours, into docs/results.md, parts.md and pruning.md; again, it goes on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs results models setup clean

demo:
	@echo "Sets up an environment, fetches three small language models, and fuses two into the third: about 7 minutes"
	@echo "on 2 CPU cores with bf16 instructions, beside downloads. Ctrl-C, and again: it resumes. It takes 5 GB of disk:"
	@echo ".venv 1.4, models 0.8 (GGUF files), ~/.cache/fuselm 1.7 (converted from them), runs 0.8."
	@$(MAKE) --no-print-directory models
	$(BIN)/fuselm run examples/quickstart.yaml

test: models setup
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: models examples/corpus/larger.jsonl
	$(BIN)/python benchmarks/measured.py unpack
	$(MAKE) runs/apart.json runs/peers.json runs/training.json
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[tasks,lora]'
	$(BIN)/fuselm study examples/study.yaml
	$(BIN)/fuselm study examples/study-tokens.yaml
	$(BIN)/fuselm study examples/study-parts.yaml
	$(BIN)/fuselm study examples/study-pairwise.yaml
	$(BIN)/fuselm study examples/study-branches.yaml
	$(BIN)/fuselm study examples/study-tasks.yaml
	$(BIN)/fuselm study examples/study-baseline.yaml
	$(BIN)/fuselm study examples/study-controls.yaml
	$(BIN)/fuselm study examples/study-second-target.yaml
	$(BIN)/fuselm prune models/smollm2-135m-instruct.gguf runs/pruned --ratio 0.2 --importance param_first --run examples/prune.yaml
	$(BIN)/fuselm study examples/study-prune.yaml
	$(BIN)/python benchmarks/measured.py keep
	$(BIN)/python benchmarks/results.py

runs/%.json: | models
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$*.py --json > $@.partial
	mv $@.partial $@

runs/training.json: | models
	$(BIN)/python benchmarks/training.py --json > $@.partial
	mv $@.partial $@

runs/peers.json: | models
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py --json > $@.partial
	mv $@.partial $@

examples/corpus/larger.jsonl: | setup
	$(BIN)/python examples/corpus/build.py --larger

# Kernels are compiled while models are fetched and converted.
models: .venv/library
	@if [ -e .venv/kernels ]; then $(BIN)/python examples/models.py models; \
	else $(BIN)/python -m fuselm.cli.warm_up & \
	$(BIN)/python examples/models.py models && $(BIN)/python -m fuselm.cli.warm_up models/*.gguf && \
	wait $$! && touch .venv/kernels; fi

setup: .venv/installed

# The library is all that a run needs; the rest is for tests, benchmarks and the site.
.venv/library: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing torch, transformers and others into .venv: 1.4 GB, a minute or two beside their download"
	$(BIN)/pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed: .venv/library
	@echo "Installing what tests and the site need into .venv"
	$(BIN)/pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs site
