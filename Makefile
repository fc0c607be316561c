PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

LOWEST ?= .venv-lowest
OLDEST ?= 3.10

.PHONY: install demo test test-slow lowest check format docs dist bench clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[vision,lab,dev]'
	touch $(STAMP)

demo: $(STAMP)
	# Layers this small gain nothing from a second thread, and lose much by waiting for it on a busy machine.
	OMP_NUM_THREADS=1 $(BIN)/sao-prune run recipes/digits.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# The same tests with the lowest versions that pyproject.toml allows, on the oldest Python.
lowest: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --allow-existing --python $(OLDEST) $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -e '.[vision,lab,dev]'
	$(LOWEST)/bin/python -m pytest -n 2 -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site: the tutorials are run, a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[vision,lab,onnx,docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/site

# Wheel and sdist, in dist: checked, and tried in an environment without extras.
dist: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[dist]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -q -m slow tests/test_distribution.py

bench: $(STAMP)
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
