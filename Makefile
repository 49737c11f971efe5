# Two commands from a fresh machine: `make demo` and `make test`. Everything else is for daily work; `make help` lists it.
# Needs python3 (3.10 or newer), a C++17 compiler and, for CUDA kernels, nvcc. The environment is .venv.

PYTHON ?= python3
VENV   ?= .venv
# The one place that pins torch. Another one: make demo TORCH=torch==2.12.0
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
# Each worker has two threads, so the threads of one must not spin while another's wait for a core.
WORKERS     := OMP_WAIT_POLICY=passive
IN_PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal
# Named after what was asked for, so that another TORCH is installed, not ignored.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml $(wildcard build_backend/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu sanitize lint docs format build clean

help:            ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP)-demo build  ## classify a real clip with stock and fused SlowFast R50 8x8
	$(BIN)/python examples/demo.py

test: $(STAMP)-test build  ## run the whole test suite
	$(WORKERS) $(BIN)/pytest $(IN_PARALLEL) --durations 20

bench: $(STAMP)-bench build  ## measure every op against stock PyTorch: a table, build/bench.json and build/bench.png
	$(BIN)/python -m slowfast_fast bench --out build/bench

# No environment is made and nothing installed: PYTHON is one with a CUDA torch, pytest, CMake and Ninja.
gpu:             ## on a CUDA machine: build, run the GPU tests and sanitizers, measure; see tools/gpu.py
	$(PYTHON) tools/gpu.py $(GPU_OPTIONS)

lint: $(STAMP)-dev       ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

docs: $(STAMP)-docs      ## build the pages of docs/ in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP)-dev     ## format every Python, C++ and CUDA file
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff check --fix .

build: $(STAMP)-torch    ## compile what changed, beside the Python sources
	$(BIN)/python setup.py --quiet build_ext --inplace

# The package with instrumented C++ lies in a folder of its own and goes first on the path. Python itself is not
# instrumented, so the runtimes are preloaded; what Python never frees is no leak of ours. The reference has no C++.
SANITIZED := build/sanitize
SANITIZED_TESTS ?= $(addprefix tests/test_,temporal_conv.py lateral_concat.py batch_norm.py batch_norm_max_pool.py spatial_conv.py stem_conv.py wide.py max_pool.py bottleneck.py bottleneck_bn.py folded_backward.py calls.py pack_pathways.py)
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))
sanitize: $(STAMP)-test  ## run the op tests under AddressSanitizer and UndefinedBehaviorSanitizer
	SLOWFAST_FAST_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	PYTHONPATH=$(SANITIZED)/lib \
	LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(WORKERS) $(BIN)/pytest $(IN_PARALLEL) -p no:cacheprovider -k "not reference" $(SANITIZED_TESTS)

clean:           ## remove what was built; the environment stays
	rm -rf build dist *.egg-info slowfast_fast/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first and pinned: the package and its extras then find it and bring no other.
$(STAMP)-torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" cmake ninja
	touch $@

# Compiled beforehand by `build`, whose progress shows; setuptools warns of every editable install.
$(STAMP)-demo $(STAMP)-test $(STAMP)-bench $(STAMP)-dev $(STAMP)-docs: $(STAMP)-%: $(STAMP)-torch $(SOURCES) | build
	PYTHONWARNINGS="ignore:Editable installation" \
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
