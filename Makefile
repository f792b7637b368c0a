PYTHON ?= python3
# cpu or gpu: which build of FAISS to install.
EXTRA  ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test test-slow check format stub clean

quickstart: $(VENV)/runtime
	@$(BIN)/readapt quickstart

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow --timeout 1800

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Signatures for editors, from the configs; run it when an option changed.
stub: $(VENV)/dev
	$(BIN)/python -m tests.stub > readapt_ray/__init__.pyi.new
	mv readapt_ray/__init__.pyi.new readapt_ray/__init__.pyi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the pin takes a local CPU build where there is one, and deepspeed's build finds it.
$(VENV)/runtime: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

$(VENV)/dev: $(VENV)/runtime
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),test,dev]'
	@touch $@
