# Each target needs git, make and Python 3.11 or later, and makes .venv with what it needs, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.ready-dev
DOCS := .venv/.ready-docs

.PHONY: help setup quickstart check test fuzz lint format clean drills docs

help:
	@echo "make quickstart   set up, then the main job on the speech that the project carries (about 3 minutes)"
	@echo "make check        set up, then style, types and the quick tests: for every edit (2 minutes)"
	@echo "make test         set up, then every test but the longest drills"
	@echo "make fuzz         set up, then COUNT=10000 damaged files, tars, tables, configs and runs of SEED=0 against every door"
	@echo "make drills       set up, then every drill: workers, nodes and drivers killed (an hour)"
	@echo "make setup        .venv with what cpcscale needs, nothing else"
	@echo "make docs         set up, then the documentation with its reference in build/site"
	@echo "make lint         ruff and mypy"
	@echo "make format       ruff, writing"
	@echo "make clean        remove .venv and runs/"

# All versions are pinned in requirements/, so pip resolves nothing but what torch needs on this machine (CUDA or not).
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
LOCKED := $(INSTALL) --no-deps --requirement
# On all cores, without the tests of packages; some packages carry files of other Pythons, which do not compile.
COMPILE := { $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true; }
packages = $$(grep -c == requirements/$(1).txt) packages
# $(call phase,NAME,COMMAND): runs the command and says how long it took.
phase = @began=$$(date +%s); printf '  %-14s' "$(1)"; $(2) && printf '%4d s\n' $$(($$(date +%s) - began))

setup: $(READY)
	@echo "ready: $(CURDIR)/.venv (activate with: source .venv/bin/activate)"

$(READY): pyproject.toml requirements/core.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cpcscale needs Python 3.11 or later, $(PYTHON) is older: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv with $(PYTHON): about 2 GB, a minute or two"
	$(call phase,venv,{ test -x $(BIN)/python || "$(PYTHON)" -m venv .venv; })
	$(call phase,PyTorch,$(INSTALL) --constraint requirements/core.txt torch)
	$(call phase,$(call packages,core),$(LOCKED) requirements/core.txt)
	$(call phase,cpcscale,$(INSTALL) --no-deps --no-build-isolation --editable .)
	$(call phase,bytecode,$(COMPILE))
	@touch $@

$(DEV): $(READY) requirements/dev.txt
	@echo "adding what the tests need"
	$(call phase,$(call packages,dev),$(LOCKED) requirements/dev.txt)
	$(call phase,bytecode,$(COMPILE))
	@touch $@

$(DOCS): $(READY) requirements/docs.txt
	@echo "adding what the documentation needs"
	$(call phase,$(call packages,docs),$(LOCKED) requirements/docs.txt)
	@touch $@

quickstart: $(READY)
	@$(BIN)/python jobs/quickstart.py

# Tests run side by side, so each process has one thread: with more, those of torch wait for each other. Files come in
# their order: by number of tests, the long drills would come last, one beside idle processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 4 --dist loadfile --no-loadscope-reorder --numprocesses
# Tests of clusters mostly wait, so all tests together keep one process more than there are cores busy.
PROCESSES := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
# The rooms that need no Ray, but for one file.
QUICK := tests/stream tests/model tests/objective tests/handmade tests/emotion tests/report --ignore tests/emotion/heads/test_from_raw.py
QUICK += tests/test_architecture.py tests/test_audio.py tests/test_config.py tests/test_requirements.py

check: lint
	$(PYTEST) logical --quiet $(QUICK)

test: $(DEV)
	$(PYTEST) $(PROCESSES)
	@echo "tests passed; the environment is $(CURDIR)/.venv"

drills: $(DEV)
	CPCSCALE_DRILLS=1 CPCSCALE_KILLS=20 $(BIN)/python -m pytest -s tests/drills tests/cluster tests/experiments tests/infra

fuzz: COUNT ?= 10000
fuzz: SEED ?= 0
fuzz: $(DEV)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --count $(COUNT) --seed $(SEED)

docs: $(DOCS)
	$(BIN)/python -m properdocs build --strict -f mkdocs.yml

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs
