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
	@echo 'make bench   beside export_llm and llama.cpp, to bench-out/peers.md; ARGS='\''--rounds 1'\'' is a quick look; hours the first time'
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

# Models and peers' artifacts stay in bench-out.
bench: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/benchmarks/peers.py --work bench-out --out bench-out/peers.md --json bench-out/peers.json $(ARGS)

venv: $(INSTALLED)

# Made again only where the packages that are asked for have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): once, some gigabytes, some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) bench-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
