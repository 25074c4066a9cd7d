# Two commands: `make verify` judges GRIT on the embedded default, `make test` tests this project.
# Both set up what they need: a virtual environment in .venv, with CPU torch where there is no GPU.
# make verify BASE=smollm2: the same on a small real language model (README, Another base model).
# Options of the verification go in ARGS: make verify ARGS="--min-delta-aqi 10 --strict-claims"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BASE ?=
ENV ?= cpu
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c requirements/cpu.txt)

.PHONY: verify test bench fixtures lint mutants clean help

help:
	@echo "make verify   train, export, evaluate and judge all arms on the embedded default (about 10 minutes on 2 cores)"
	@echo "make test     the project's own tests, through tox (about 33 minutes on 2 cores); ENV=py311-tf5: on those versions"
	@echo "make bench    what GRIT costs, against plain LoRA and its peers (7 minutes, nothing else running; 14 to 24 with the converter of llama.cpp: pip install sentencepiece)"
	@echo "make fixtures rebuild the tiny base model and the frozen test sets"
	@echo "make lint     ruff and mypy"
	@echo "make mutants  how many small errors in what decides do the tests notice (10 minutes)"

verify: $(VENV)/.verify
	$(BIN)/python -m pytest suites -m "verify and not gpu" $(if $(BASE),--base-model $(BASE)) $(ARGS)

test: $(VENV)/.tox
	$(BIN)/tox run -e $(ENV)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest suites/benchmarks -q --write-performance --benchmark-disable-gc \
		--benchmark-columns=median,iqr,rounds $(ARGS)

fixtures: $(VENV)/.verify
	$(BIN)/python -m grit_impl.recipes.tiny_llama --out fixtures/tiny_llama --test-sets fixtures

mutants: $(VENV)/.tox
	$(BIN)/tox run -e mutants -- $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: a package that asks for "any torch" would otherwise pull in a CUDA build on a machine without a GPU.
$(VENV)/.verify: pyproject.toml requirements/cpu.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[all]"
	@touch $@

$(VENV)/.dev: $(VENV)/.verify
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@touch $@

$(VENV)/.tox: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "tox>=4"
	@touch $@

clean:
	rm -rf $(VENV) .tox build dist *.egg-info
