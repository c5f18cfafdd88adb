# Two commands do everything: `make run` and `make test`. Both make the environment first, from nothing but the package index.

PYTHON ?= python3
RECIPE ?= demo
ROOT ?= runs/$(notdir $(basename $(RECIPE)))
ARGS ?=
BIN := .venv/bin

.PHONY: run test test-all lint ui clean

run: .venv/installed
	$(BIN)/python pipelines/full.py --recipe $(RECIPE) --root $(ROOT) $(ARGS)

test: .venv/installed .venv-checkov/installed
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 $(ARGS)

test-all: .venv/installed .venv-checkov/installed
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ui: .venv/installed
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(abspath $(ROOT))/mlflow.db

clean:
	rm -rf runs

# torch first: with it in place nothing else pulls another build of it
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) must be Python 3.11 or newer: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The linter of cluster/deploy pins what we pin too, so it lives by itself. Where it cannot be had, its test says so and is skipped.
.venv-checkov/installed: Makefile
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30 && touch $@ || { rm -rf .venv-checkov; echo "no checkov: its test is skipped"; }
