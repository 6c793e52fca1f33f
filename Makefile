# Every target sets up what it needs: on a fresh machine `make demo` is enough.
PYTHON ?= python3
VENV ?= .venv
# Where the demo writes; what pytest is told besides, e.g. ARGS='-m "not slow"'.
OUT ?= demo-out
ARGS ?=
# Test files that run side by side, each on one thread; every one may take some 4 GB.
WORKERS ?= 2

# What Android work fetches and compiles.
export LOBIT_ANDROID ?= $(CURDIR)/.android

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HARNESS := $(VENV)-harness

.PHONY: help demo app android-programs test harness check bench ablation rounding ternary venv clean

help:
	@echo 'make demo    the shipped model through everything, to $(OUT)/report.html'
	@echo 'make app     the Android app with the demo model, to app.apk; installs what is missing of Debian'\''s programs where it may'
	@echo 'make test    every test; ARGS='\''-m "not slow"'\'' leaves out the slow ones, WORKERS=4 uses four cores'
	@echo 'make harness  lobit eval beside lm-evaluation-harness, item by item, in an environment of its own'
	@echo 'make check   lint, types, layout'
	@echo 'make bench   beside export_llm and llama.cpp, to bench-out/peers.md; ARGS='\''--rounds 1'\'' is a quick look; hours the first time'
	@echo 'make ablation  what every recipe costs and wins back, to tests/benchmarks/ablation/; about an hour. ARGS='\''--model demo'\'': the demo model, with accuracy'
	@echo 'make rounding  what rounding costs a real chat model, method by method, to tests/benchmarks/rounding/; about half an hour'
	@echo 'make clean   removes $(VENV), $(OUT), build outputs and caches'

demo: $(OUT)/report.html
	@echo 'report: $(OUT)/report.html'

# Made once; `make clean` removes it.
$(OUT)/report.html: | $(INSTALLED)
	$(BIN)/lobit demo --out $(OUT)

app: android-programs
	$(BIN)/lobit android build -o app.apk

# Debian's programs for the app, emulated phones and adb. Only root may install them; anyone else is told the command.
MISSING := from lobit.android.artifacts import *; missing = missing_programs(); print(install_command(missing) if missing else "")
android-programs: $(INSTALLED)
	@install=$$($(BIN)/python -c '$(MISSING)') && if [ -z "$$install" ]; then exit; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update && DEBIAN_FRONTEND=noninteractive $$install --yes; \
	else echo "missing; as root: $$install"; exit 2; fi

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# lm-evaluation-harness changes what transformers does (accelerate), so that it has an environment of its own, over the other one's packages.
harness: $(HARNESS)/.installed
	OMP_NUM_THREADS=1 $(HARNESS)/bin/python -m pytest tests/lobit/test_harness.py $(ARGS)

$(HARNESS)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(HARNESS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
	  > "$$($(HARNESS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lobit.pth"
	$(HARNESS)/bin/python -m pip install --disable-pip-version-check 'lm_eval[hf]==0.4.13'
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

# Models and peers' artifacts stay in bench-out.
bench: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/benchmarks/peers.py --work bench-out --out bench-out/peers.md --json bench-out/peers.json $(ARGS)

# What every recipe costs and wins back; what is finished stays in bench-out.
ablation: $(INSTALLED)
	$(BIN)/python tests/benchmarks/ablation.py $(ARGS)

# A real chat model, texts, and the table; ARGS='--trained CHECKPOINT' adds a trained model's row.
CHAT := bench-out/SmolLM2-135M-Instruct
rounding: $(INSTALLED)
	mkdir -p bench-out
	test -d $(CHAT) || $(BIN)/lobit fetch smollm2 -o $(CHAT)
	test -d bench-out/texts || $(BIN)/python tests/benchmarks/texts.py $(CHAT) bench-out/texts
	$(BIN)/python tests/benchmarks/rounding.py --model $(CHAT) $(ARGS)

# The ternary model that ships, trained from the float one: some twenty minutes of one core.
ternary: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python -m lobit.demo.stories > bench-out/stories.txt
	OMP_NUM_THREADS=1 $(BIN)/lobit train demo --recipe bitnet --text bench-out/stories.txt --length 512 --batch 4 --steps 1500 \
	  --distillation 1 -o bench-out/ternary
	cd bench-out/ternary && cp config.json recipe.json model.safetensors tokenizer.json tokenizer_config.json training.json ../../lobit/demo/ternary

venv: $(INSTALLED)

# Made again only where the packages that are asked for have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): once, some gigabytes, some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(HARNESS) $(OUT) app.apk .android bench-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
