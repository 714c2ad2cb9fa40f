# make demo   a first federation: 4 MPI ranks, 2 ZeRO clients at a time, real model, no download
# make test   lint, types, tests without MPI and on real MPI worlds
# make test-all   the same with full products, a fresh MPI world for every case, and real data
# make test-long  as many of the long tests as fit into BUDGET seconds, 300 unless told
# make test-cluster   launch tests on a real Slurm of two hosts inside this machine; as root on Debian
# make test-gpu   engine, equivalence and faults of clients of one rank on the GPU, if there is one
# Each does all of its own set-up in .venv; PYTHON, and anything pip reads, may be set by you.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-long test-all test-cluster test-gpu lint clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet torch numpy setuptools wheel
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet -e '.[mpi,demo,dev]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/hpcfed run demo --ranks 4

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long" tests/unit tests/mpi

# As many of the long ones as fit into BUDGET seconds; what is left out is named.
BUDGET ?= 300
test-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m long --budget=$(BUDGET) tests/unit tests/mpi

# PYTEST_ARGS: as --budget=SECONDS, which names what it left out.
test-all: lint
	HPCFED_FRESH_WORLDS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/unit tests/mpi $(PYTEST_ARGS)

test-cluster: setup
	tests/cluster/install
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/cluster

# With its own Python where nothing can be installed, see benchmarks/gpu_wheels.
GPU_PYTHON ?= $(BIN)/python
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)
	$(GPU_PYTHON) -m pytest -m "not long" -k 1x1 tests/mpi/test_engine.py tests/mpi/test_faults.py \
		tests/mpi/test_equivalence.py

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
