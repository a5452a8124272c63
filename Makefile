# Sets up a virtual environment once, then demonstrates or tests. Needs Python 3.11-3.13, make and git.
#
#   make demo                        the whole way, on the tiny model that ships with the package
#   make test                        lint, types and tests: what CI runs
#   make test PYTHON=python3.12      with another Python
#   make gpu-check                   on a machine with an NVIDIA GPU: everything that only it can say
#   make tables                      README's measured tables, from benchmarks/results
#   make demo PIP_FLAGS='…'          flags for pip: PyTorch's CPU index, say, where yours has only the CUDA build

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
GPU_CHECK_OUT ?= gpu-check-output
GPU_CHECK_FLAGS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -c constraints.txt
set_up := $(bin)/python pyproject.toml constraints.txt
packages := $(foreach room,engines runtime exporter,-p llava_deploy.$(room)) -m llava_deploy.cli

.DELETE_ON_ERROR:
.PHONY: help demo test lint types gpu-check tables format clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

demo: $(VENV)/demo.stamp
	$(bin)/llava-deploy demo

# Two processes, a file of tests never in both; one thread in each, since they share the cores.
test: lint types
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(bin)/ruff check .
	$(bin)/ruff format --check .

# Type checkers do not see that the repository's root is the package llava_deploy: a link says it.
types: $(VENV)/dev.stamp
	@mkdir -p $(VENV)/typecheck && ln -sfn $(CURDIR) $(VENV)/typecheck/llava_deploy
	cd $(VENV)/typecheck && $(abspath $(bin))/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache $(packages)

gpu-check: $(VENV)/dev.stamp
	$(bin)/python benchmarks/gpu_check/check.py $(GPU_CHECK_OUT) $(GPU_CHECK_FLAGS)

tables:
	$(PYTHON) benchmarks/readme_table.py

format: $(VENV)/dev.stamp
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "want Python 3.11 to 3.13, found $$($(PYTHON) --version 2>&1): name another with PYTHON=python3.12"; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(set_up)
	@echo "Installing into $(VENV): some hundred megabytes, a few minutes the first time"
	$(pip) -e '.[cpu,export]'
	@touch $@

# TensorRT for RTX builds engines without a GPU, so the tests build them.
$(VENV)/dev.stamp: $(set_up)
	@echo "Installing into $(VENV): about a gigabyte, some minutes the first time"
	$(pip) -e '.[cpu,export,rtx,bench,dev]'
	@touch $(VENV)/demo.stamp $@
