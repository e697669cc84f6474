# `make quickstart` and `make test` need git, make and Python 3.11 or later; each makes .venv itself, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup quickstart test lint format clean drills docs

help:
	@echo "make quickstart   set up, then the main job on the speech that the project carries (about 10 minutes)"
	@echo "make test         set up, then every test but the longest drills"
	@echo "make drills       set up, then every drill: workers, nodes and drivers killed (an hour)"
	@echo "make setup        .venv with everything, nothing else"
	@echo "make docs         set up, then the documentation with its reference in build/site"
	@echo "make lint         ruff and mypy"
	@echo "make format       ruff, writing"
	@echo "make clean        remove .venv and runs/"

setup: $(READY)
	@echo "ready: $(CURDIR)/.venv (activate with: source .venv/bin/activate)"

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cpcscale needs Python 3.11 or later, $(PYTHON) is older: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv with $(PYTHON): about 2.5 GB, a few minutes"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "[1/2] PyTorch"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "[2/2] cpcscale and the rest"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/python jobs/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
	@echo "tests passed; the environment is $(CURDIR)/.venv"

drills: $(READY)
	CPCSCALE_DRILLS=1 CPCSCALE_KILLS=20 $(BIN)/python -m pytest -s tests/drills tests/cluster tests/infra

docs: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m properdocs build --strict -f mkdocs.yml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs
