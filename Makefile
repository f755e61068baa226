# make demo   the whole story on a small real model
# make test   linters, types and tests, against the installed package
# make lint   linters and types only
# make native the native libraries in build/native, for running from source: PARING_LIBRARY=build/native/libparing.so and
#             PARING_TENSORFLOW_LIBRARY=build/native/libparing_tensorflow.so
# make native-test  its tests, plain and under the address, undefined behaviour and thread sanitizers
# make clean  removes what these made
#
# PYTHON      the interpreter that .venv is made with: 3.10 to 3.13
# TF          the TensorFlow package for the tests of its converter and its SavedModels; `make test TF=` goes without

PYTHON ?= python3
TF ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),tensorflow-cpu,tensorflow)
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What the installed package is made of: a change of any of these installs it again.
SOURCES := pyproject.toml LICENSE README.md $(shell find src native -type f -not -name '*.pyc')
# Objects of the native library outlive an installation, so that a changed Python file compiles nothing; pip's isolated
# environment would throw them away, but it is what brings CMake where the system has none.
export SKBUILD_BUILD_DIR := build/install
ISOLATION := $(if $(shell command -v cmake),--no-build-isolation)

# An inherited PYTHONPATH would put another copy of paring before the installed one, the others another library.
unexport PYTHONPATH PARING_LIBRARY PARING_TENSORFLOW_LIBRARY

.PHONY: demo test lint native native-quick native-test clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/paring demo

test: lint $(if $(and $(shell command -v cmake),$(shell command -v $(or $(CXX),c++))),native-quick)
	$(BIN)/python -m pytest -n $(JOBS) tests --pyargs paring

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

native:
	cmake -S native -B build/native
	cmake --build build/native -j $(JOBS)

# On the objects that installing has left.
native-quick: $(VENV)/test.stamp
	cmake -S native -B $(SKBUILD_BUILD_DIR) -DPARING_TESTS=ON
	cmake --build $(SKBUILD_BUILD_DIR) -j $(JOBS)
	ctest --test-dir $(SKBUILD_BUILD_DIR) --output-on-failure

native-test: build/tests/.built build/tests-address/.built build/tests-thread/.built
	for kind in "" -address -thread; do ctest --test-dir build/tests$$kind --output-on-failure || exit 1; done

build/tests/.built build/tests-address/.built build/tests-thread/.built: $(shell find native -type f)
	cmake -S native -B $(@D) -DPARING_TESTS=ON -DPARING_SANITIZE=$(patsubst build/tests-%/.built,%,$(filter-out build/tests/.built,$@))
	cmake --build $(@D) -j $(JOBS)
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests tools -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "paring needs Python 3.10 to 3.13, and \`$(PYTHON)\` is none. Say which to use: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "\`$(PYTHON)\` comes without its venv module. On Debian and Ubuntu: sudo apt install python3-venv" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/build.stamp: | $(VENV)/created.stamp
	$(PIP) install scikit-build-core
	@touch $@

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)/build.stamp
	$(PIP) install $(ISOLATION) '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(SOURCES) | $(VENV)/build.stamp
ifeq ($(strip $(TF)),)
	$(PIP) install $(ISOLATION) '.[test]'
else
	$(PIP) install $(ISOLATION) '.[test,tf]' $(TF) || { \
	  echo "Could not install $(TF), for the reason above: tests that need it will be skipped." >&2; \
	  $(PIP) install $(ISOLATION) '.[test]'; }
endif
	@touch $@
