# make run     environment, notebook, sample, execution; prints the path of the HTML page
# make test    the same environment and the whole test suite
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test torture notebook lint check bench clean help

help:
	@sed -n 's/^# make/make/p' Makefile

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "Python's venv is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

notebook: .venv/installed
	$(BIN)/python create_enhanced_notebook.py
	$(BIN)/python extend_notebook.py
	$(BIN)/python complete_notebook.py

run: notebook
	$(BIN)/python complete_notebook.py --execute --set DATASET=sample $(SET)

# make lint    ruff and mypy, without the tests
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: .venv/installed
	$(BIN)/python complete_notebook.py --check

test: lint check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# make bench   measure speed and memory against the peers; BENCH="--half 1" for a part of it
bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH)

# make torture kill runs at random, damage their files, feed them rubbish; half an hour on 2 cores
torture: .venv/installed
	$(BIN)/python -m benchmarks.torture $(TORTURE)

# make clean   remove the sample, the image cache and all runs (not the environment)
clean:
	rm -rf data/sample cache outputs
