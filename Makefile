# The first two work from a fresh clone with Python >= 3.11, a C++ compiler and make: they create the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What our speed is compared with, in an environment of its own.
PEERS ?= .venv-peers
ARGS ?=
SOURCES := pyproject.toml $(shell find qlora_jax xla_ffi configs -type f -not -name '*.so' -not -name '*.pyc')

# -P keeps the clone's own qlora_jax/ folder from shadowing the installed package.
RUN := $(BIN)/python -P -m

.PHONY: help train test test-interop test-real lint bench bench-cpu bench-step bench-demo clean
.DEFAULT_GOAL := help

help:
	@echo "make train         set up, then finetune SmolLM2-135M-Instruct with QLoRA (ARGS='key=value ...' are passed on)"
	@echo "make test          set up, then run the test suite"
	@echo "make test-interop  compare with torch, transformers and PEFT"
	@echo "make test-real     run the tests that need the real model"
	@echo "make lint          ruff, mypy, import-linter"
	@echo "make bench         time the kernels against XLA, as JSON"
	@echo "make bench-cpu     the same beside bitsandbytes and torch, installed into $(PEERS); bench-step, bench-demo: whole steps"
	@echo "make clean         remove the environment, builds and caches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 ..." if not (3, 11) <= v[:2] < (3, 14) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(BIN)/python $(SOURCES)
	@echo "installing qlora_jax and what it needs into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet .
	@touch $@

# An extra is installed once; its stamp goes stale with pyproject.toml. Its requirements alone: pip install '.[test]' would
# compile the kernels once more.
$(VENV)/extra-%: $(VENV)/installed pyproject.toml
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"], sep="\n")' > $(VENV)/$*.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/$*.txt
	@touch $@

train: $(VENV)/installed
	$(RUN) qlora_jax.train $(ARGS)

test: $(VENV)/extra-test
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-interop: $(VENV)/extra-test $(VENV)/extra-interop
	$(BIN)/pytest -n auto --dist loadfile -m "interop and not real" $(ARGS)

test-real: $(VENV)/extra-test $(VENV)/extra-interop
	$(BIN)/pytest -m real $(ARGS)

lint: $(VENV)/extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(RUN) qlora_jax.bench $(ARGS)

# The interop extra and the transformers that the project itself takes, without the project.
$(PEERS)/installed: pyproject.toml $(BIN)/python
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["optional-dependencies"]["interop"], *(d for d in p["dependencies"] if d.startswith("transformers")), sep="\n")' > $(PEERS)/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --requirement $(PEERS)/peers.txt
	@touch $@

bench-cpu bench-step bench-demo: bench-%: $(VENV)/installed $(PEERS)/installed
	$(RUN) qlora_jax.bench $* --peers $(PEERS)/bin/python $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS) .ci-* build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
