# Two commands: `make train` trains the bundled tiny student in minutes, `make test` runs all tests. Both make what they need.
#
#   make train RECIPE=recipes/my-data.yaml ARGS="--seed=1"     another recipe, other settings
#   make train PYTHON=python3.12                               another interpreter (3.11 or later)
#   make test PIP_ARGS="--index-url ..."                       another package index

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/lab.yaml
ARGS ?=
PIP_ARGS ?=

# Tests run in as many processes as there are cores, four at most, each with one thread.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(JOBS) --maxprocesses 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt
SOURCES := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test check lint fuzz clean

help:
	@echo "make train   train the bundled tiny student by $(RECIPE)"
	@echo "make test    all tests"
	@echo "make check   ruff, mypy and the quick tests"
	@echo "make lint    ruff and mypy"
	@echo "make fuzz    the grader's fuzz tests, many examples"
	@echo "make clean   remove the environment"

train: $(VENV)/.installed
	$(BIN)/zppo train $(RECIPE) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

check: lint
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

fuzz: $(VENV)/.installed-dev
	ZPPO_FUZZ_EXAMPLES=$${ZPPO_FUZZ_EXAMPLES:-20000} $(BIN)/python -m pytest -q -k fuzz --timeout 0 $(ARGS)

clean:
	rm -rf "$(VENV)"

# A stamp per set of packages: nothing is installed again until the project's requirements change.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "installing zppo into $(VENV) (once; torch is large)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	@echo "installing zppo and its test tools into $(VENV) (once; torch is large)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zppo needs Python 3.11 or later, $(PYTHON) is older or missing; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || \
		{ rm -rf "$(VENV)"; echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
