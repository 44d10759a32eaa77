# Needs python3 (3.10 or newer), make and git. Everything else goes into .venv. Every target is safe to repeat.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export UV_HTTP_TIMEOUT ?= 300
export PLOTLY_RENDERER ?= plotly_mimetype
export MPLBACKEND ?= agg

# The stamp holds this folder's path: the scripts of a moved or copied .venv still name the old place, so it is built again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
STALE := stale
endif

.PHONY: help install lab browser test slow check format clean distclean stale
help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(STAMP)  ## create .venv with everything in it; instant when settings.ini has not changed
	@echo "ready: $(BIN)/lfpm --help"

$(STAMP): settings.ini setup.py pyproject.toml $(STALE)
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; install Python 3.10 or newer, or name one: make install PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v < (3, 10) and sys.exit("$(PYTHON) is Python %d.%d; lfpm_nb needs 3.10 or newer. Name another one: make install PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: its module ensurepip is missing." >&2; \
	  echo "On Debian or Ubuntu: sudo apt install python3-venv. Or name another one: make install PYTHON=python3.12" >&2; exit 1; }
	@[ -z "$(STALE)" ] || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python torch torchvision -e '.[dev]'  # where Python may not write bytecode (many containers), every process would compile torch again
	@echo '$(CURDIR)' > $@

lab: install  ## the main run at laptop scale: table and figure in minutes; a repeat reuses what has not changed
	$(BIN)/lfpm run main --preset lab
	$(BIN)/lfpm table main  # the last line says where the figure lies

browser:  # a Chromium for the tests that look at pages; where it cannot be installed they say why they are skipped
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "no chromium here and none could be installed: tests in a browser will be skipped. On Debian or Ubuntu: sudo apt-get install chromium" >&2

test: install browser  ## every fast test: the library notebooks, then pytest
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	LFPM_RUNS="$$tmp/runs" LFPM_CACHE="$$tmp/cache" LFPM_QUIET=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5 -m "not slow"

slow: install browser  ## the tests marked slow (minutes); none selected is no failure
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5 -m slow || [ $$? -eq 5 ]

check: install  ## are notebooks and modules in step and clean, and outputs within the limits? Repairs what it can
	@files() { git ls-files -co --exclude-standard -- nbs lfpm_nb | sort | xargs -r sha256sum; }; before=$$(files); \
	$(BIN)/nbdev_export; $(BIN)/nbdev_clean; \
	changed=$$(comm -3 <(echo "$$before" | sort) <(files | sort) | awk '{print $$2}' | sort -u); \
	[ -z "$$changed" ] || { printf 'These were out of step or not clean. They are in order now: review and commit them.\n%s\n' "$$changed" >&2; exit 1; }
	$(BIN)/ruff format --check -q . || { echo "make format puts the lines in order" >&2; exit 1; }
	$(BIN)/ruff check -q .
	$(BIN)/python -m pytest -q tests/test_repo.py

format: install  ## put the lines of notebooks and tests in order
	$(BIN)/ruff format -q .
	$(BIN)/nbdev_export; $(BIN)/nbdev_clean

clean:  ## remove bytecode, test caches and build leftovers; keeps .venv and your runs/
	rm -rf build dist *.egg-info .pytest_cache .hypothesis _docs _proc
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs -r rm -rf

distclean: clean  ## clean, and remove .venv too; keeps your runs/
	rm -rf $(VENV)
