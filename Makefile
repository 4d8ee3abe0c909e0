# make run: set all up and run the service on its embedded default. make test: set all up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint setup bench lock clean

run: $(VENV)/.run
	@exec $(BIN)/gunicorn -c gunicorn.conf.py wsgi:app

test: $(VENV)/.dev
	$(BIN)/python -m tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(VENV)/.dev

# The servers side by side: docs/BENCHMARKS.md, anew. ops/bench/README.md tells what is measured, and how.
bench: $(VENV)/.bench
	$(BIN)/python ops/bench/compare.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes
# gunicorn's parser in C comes as source only: without a compiler gunicorn's own parser does the same, slower.
FAST = $(PIP) -r requirements-fast.txt 2> /dev/null || echo "no C compiler: going on with gunicorn's parser in Python"

$(VENV)/.run: requirements.txt requirements-fast.txt | $(VENV)/bin/python
	$(PIP) -r requirements.txt
	@$(FAST)
	@touch $@

$(VENV)/.dev: requirements.txt requirements-fast.txt requirements-dev.txt | $(VENV)/bin/python
	$(PIP) -r requirements-dev.txt
	@$(FAST)
	@touch $(VENV)/.run $@

$(VENV)/.bench: requirements-bench.txt requirements-fast.txt | $(VENV)/bin/python
	$(PIP) -r requirements-bench.txt
	@$(FAST)
	@touch $@

# The lock files, again from what is asked for in the .in files.
lock: $(VENV)/.dev
	for each in requirements requirements-fast requirements-dev requirements-bench; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --custom-compile-command "make lock" -o $$each.txt $$each.in; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
