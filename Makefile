# `make help` lists the targets. Everything goes into .venv; PYTHON=... names the interpreter to make it with.
# ARGS=... is passed on: recipe overrides for quickstart (ARGS="training.lr=1e-3"), pytest's arguments for tests.
ARGS ?=
venv := .venv
# Files of tests side by side: most of a test is a process that starts.
in_parallel := --numprocesses logical --maxprocesses 4 --dist loadfile
pip_install = $(venv)/bin/python -m pip install --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test test-slow test-slurm test-gpu check format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(venv)/.installed-quickstart ## install, then run Branch-Train-MiX whole on three domains of text
	@$(venv)/bin/btx run examples/quickstart.yaml $(ARGS)

test: $(venv)/.installed-test ## install what the tests need, then run the quick ones
	@$(venv)/bin/python -m pytest -q $(in_parallel) $(ARGS)

test-slow: $(venv)/.installed-test ## tests that take minutes: whole runs, many layouts
	$(call run_marked,slow and not slurm and not gpu,$(in_parallel))

test-slurm: $(venv)/.installed-test ## tests on a local Slurm cluster
	$(call run_marked,slurm)

test-gpu: $(venv)/.installed-test ## tests that need a CUDA device
	$(call run_marked,gpu)

check: $(venv)/.installed-dev ## lint, format and types, changing nothing
	@$(venv)/bin/ruff check
	@$(venv)/bin/ruff format --check
	@$(venv)/bin/mypy
	@$(venv)/bin/shellcheck --exclude=SC1091 .ci/run slurm/common.sh slurm/*.sbatch tools/*.sh

format: $(venv)/.installed-dev ## mend what ruff can mend
	@$(venv)/bin/ruff check --fix
	@$(venv)/bin/ruff format

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(venv) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra, so that an install happens once and again when what is asked for changes.
# dev holds test, and test holds quickstart.
stamps_of_test := $(venv)/.installed-quickstart
stamps_of_dev := $(venv)/.installed-test $(stamps_of_test)
$(venv)/.installed-%: $(venv)/.made pyproject.toml constraints.txt
	@echo "Installing btx-megatron[$*] into $(venv); the first time this fetches about 2 GB."
	@$(pip_install) '.[$*]'
	@touch $@ $(stamps_of_$*)

# A .venv without the stamp was left by an interrupted run: it is made anew.
$(venv)/.made:
	@python=$$(sh tools/find_python.sh) || exit $$?; \
	echo "Making $(venv) with $$python"; \
	"$$python" -m venv --clear $(venv)
	@touch $@

define run_marked
	@$(venv)/bin/python -m pytest -q -m "$(1)" $(2) $(ARGS)
endef
