# Every target sets up what it needs: on a fresh machine `make demo` is enough.
PYTHON ?= python3
VENV ?= .venv
# Where the demo writes; what pytest is told besides, e.g. ARGS='-m "not slow"'.
OUT ?= demo-out
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test check bench venv clean

help:
	@echo 'make demo    the shipped model through everything, to $(OUT)/report.html'
	@echo 'make test    every test; ARGS='\''-m "not slow"'\'' leaves out the slow ones'
	@echo 'make check   lint, types, layout'
	@echo 'make bench   speed and memory of the bundles that the demo made'
	@echo 'make clean   removes $(VENV), $(OUT), build outputs and caches'

demo: $(OUT)/report.html
	@echo 'report: $(OUT)/report.html'

# Made once; `make clean` removes it.
$(OUT)/report.html: | $(INSTALLED)
	$(BIN)/lobit demo --out $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: demo
	$(BIN)/lobit bench $$(find $(OUT) -name manifest.json -exec dirname {} \; | sort)

venv: $(INSTALLED)

# Made again only where the packages that are asked for have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): once, some gigabytes, some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
