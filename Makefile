# Every target sets up .venv by itself; nothing needs to be installed or activated first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --use-pep517
BENCHES := $(sort $(wildcard tests/bench/[a-z]*.py))
WAIT := Installing into .venv; the first time this takes minutes and, on Linux, about 6 GB

.DEFAULT_GOAL := help
.PHONY: help demo test campaign lab docs export bench browser clean distclean

help:
	@echo 'make demo    train on shipped data in about a minute; table here, surface in demo/surface.html'
	@echo 'make demo FEWSHOT=1   new characters from one example each, up to three minutes; demo/fewshot.html'
	@echo 'make test    every check: lint, notebooks, package, browser'
	@echo 'make campaign   kill, hinder and damage everything that is written, at length; the table of what came of it'
	@echo 'make lab     the notebooks in JupyterLab'
	@echo 'make docs    notebooks, guides and reference as a site, docs/_build/html/index.html'
	@echo 'make export  write mebqat/*.py from nbs/*.ipynb, and tidy the notebooks'
	@echo 'make bench   speed and memory'
	@echo 'make clean   remove what the others made; distclean removes .venv as well'
	@echo 'PYTHON=python3.12 make ... chooses the Python that .venv is made with (3.10 or newer)'

demo: .venv/.demo
	$(BIN)/mebqat demo --out demo $(if $(FEWSHOT),--few-shot)

test: .venv/.dev .venv/.learn2learn browser
	$(BIN)/ruff check --no-cache --select F mebqat
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

campaign: .venv/.dev
	$(BIN)/python tests/campaign.py

lab: .venv/.lab
	$(BIN)/mebqat lab

docs: .venv/.dev
	$(BIN)/python docs/make.py --strict

export: .venv/.dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

bench: .venv/.dev .venv/.learn2learn
	@set -e; for f in $(BENCHES); do echo "== $$f"; $(BIN)/python $$f; done

# One stamp file for each stage. settings.ini holds the requirements, so a change there installs again.

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'mebqat needs Python 3.10 or newer as $(PYTHON); choose another with: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.demo: settings.ini setup.py | .venv/.python
	@echo '$(WAIT)'
	$(INSTALL) -e .
	@touch $@

.venv/.lab: settings.ini setup.py | .venv/.python
	@echo '$(WAIT)'
	$(INSTALL) -e '.[lab]'
	@touch .venv/.demo $@

.venv/.dev: settings.ini setup.py | .venv/.python
	@echo '$(WAIT)'
	$(INSTALL) -e '.[dev]'
	@touch .venv/.demo .venv/.lab $@

# Its published C code is too old for Python 3.11, so it is built anew, without its pins (numpy below 2).
.venv/.learn2learn: | .venv/.dev
	@if $(INSTALL) --no-deps --config-settings '--build-option=build_ext' learn2learn==0.2.0; then touch $@; \
	else echo 'learn2learn did not build (it needs a C compiler): tests that compare with it will be skipped'; fi

browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then \
		if [ "$$(id -u)" = 0 ]; then as=; else as='sudo -n'; fi; \
		$$as apt-get update && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium \
		|| echo 'chromium did not install: browser tests will be skipped'; \
	else echo 'no chromium here, and no right to install it: browser tests will be skipped'; fi

clean:
	rm -rf demo build dist *.egg-info docs/_build _proc _docs .pytest_cache tests/.pytest_cache .hypothesis .ruff_cache
	find mebqat nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean
	rm -rf .venv
