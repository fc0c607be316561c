PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := $(BIN)/uv

LOWEST ?= .venv-lowest
OLDEST ?= 3.10
NEWEST ?= .venv-newest
LATEST ?= 3.13
# Folders or files; all tests if none are named.
TESTS  ?=

ASAN   := -fsanitize=address -fno-omit-frame-pointer -g1

.PHONY: install demo test test-slow lowest newest asan check format docs dist bench clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[vision,lab,dev]'
	touch $(STAMP)

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

demo: $(STAMP)
	# Layers this small gain nothing from a second thread, and lose much by waiting for it on a busy machine.
	OMP_NUM_THREADS=1 $(BIN)/sao-prune run recipes/digits.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# The same tests with the lowest versions that pyproject.toml allows, on the oldest Python.
lowest: $(UV)
	$(UV) venv --quiet --allow-existing --python $(OLDEST) $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST) --resolution lowest-direct -e '.[vision,lab,dev]'
	$(LOWEST)/bin/python -m pytest -n 2 -q $(TESTS)

# And with the newest of all, on the latest Python.
newest: $(UV)
	$(UV) venv --quiet --allow-existing --python $(LATEST) $(NEWEST)
	$(UV) pip install --quiet --upgrade --python $(NEWEST) -e '.[vision,lab,dev]'
	$(NEWEST)/bin/python -m pytest -n 2 -q $(TESTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels under AddressSanitizer, by gcc; they are compiled without the preloaded libraries. Without -s, pytest
# would swallow what it finds.
asan: $(STAMP)
	export CC="env -u LD_PRELOAD gcc $(ASAN)" LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0; \
	$(BIN)/python -c "from sao_prune.blocks.backends import cpu; raise SystemExit(cpu.why_unavailable())" && \
	$(BIN)/python -m pytest -q -s -p no:cacheprovider -k "not derivatives and not registration" \
	tests/blocks/test_cpu.py tests/blocks/test_conv.py tests/blocks/test_storages.py tests/blocks/test_memory.py tests/blocks/test_operators.py tests/blocks/test_pooled.py tests/blocks/test_normed.py

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
	rm -rf $(VENV) $(LOWEST) $(NEWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
