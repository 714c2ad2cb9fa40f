# make demo   a first federation: 4 MPI ranks, 2 ZeRO clients at a time, real model, no download
# make test   lint, types and all tests
# make test-cluster   launch tests on a real Slurm of two hosts inside this machine; as root on Debian
# Each does all of its own set-up in .venv; PYTHON, and anything pip reads, may be set by you.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-cluster lint clean

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
	$(BIN)/python -m pytest -n auto --dist loadfile tests/unit tests/mpi

test-cluster: setup
	tests/cluster/install
	$(BIN)/python -m pytest tests/cluster

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
