# One command for each task. `make` alone lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
PROMPT ?= What is the capital of France?
SOURCE ?= demo
VENV = .venv
READY = $(VENV)/.ready
MODEL = weights/manifest.json
LONG = $(if $(NIGHTLY),14400,120)
SOAK_SECONDS ?= $(LONG)
FUZZ_SECONDS ?= $(LONG)

REPLICAS ?= 2

.PHONY: help predict serve ray test lint docs weights build bench gpu soak fuzz clean

help:  ## List the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

predict: $(READY) $(MODEL)  ## Run one prediction: make predict PROMPT="..."
	@script/predict -i prompt="$$PROMPT"
export PROMPT

serve: $(READY) $(MODEL)  ## Serve predictions over HTTP on 127.0.0.1:5000
	@script/serve

ray: $(READY) $(MODEL)  ## Serve several replicas on 127.0.0.1:8000 with Ray Serve: make ray REPLICAS=2
	@$(VENV)/bin/python -m deploy.ray_serve --replicas $(REPLICAS)

test: $(READY) $(MODEL)  ## Run all tests
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile

soak: $(READY)  ## Send a mix of everything for two minutes; NIGHTLY=1 or SOAK_SECONDS=600 for longer
	@SOAK_SECONDS=$(SOAK_SECONDS) $(VENV)/bin/python -m pytest tests/soak

fuzz: $(READY)  ## Send hostile input and kill downloads for two minutes; NIGHTLY=1 or FUZZ_SECONDS=600 for longer
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(VENV)/bin/python -m pytest tests/fuzz -s

lint: $(READY)  ## Check format, lint, types and import directions
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy --scripts-are-modules $$(grep -l '^#!.*python' script/* | grep -v script/predict)
	@$(VENV)/bin/mypy --scripts-are-modules script/predict  # alone: the others may import predict.py
	@$(VENV)/bin/lint-imports

docs: $(READY)  ## Write the inputs of predict.py into README.md
	@script/inputs_table

weights: $(READY)  ## Fetch a model into weights/: make weights SOURCE=org/name (default: the demo model)
	@script/download_weights $(SOURCE)

build: $(READY) $(MODEL)  ## Compile the model's step for this machine
	@script/build

bench: $(READY) $(MODEL)  ## Measure against peers; write benchmarks/results/
	@script/benchmark

gpu: $(READY) $(MODEL)  ## Test and measure on a GPU; write benchmarks/results/
	@script/benchmark --gpu

clean:  ## Remove the environment, compiled steps and caches; weights stay
	rm -rf $(VENV) compiled .cache .cog .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

$(MODEL): | $(READY)
	@script/download_weights $(SOURCE)
