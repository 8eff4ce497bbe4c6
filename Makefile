# Every target does its own set-up: `make demo` or `make test` may be the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
SOURCES := megatron_prune tools tests benchmarks csrc setup.py $(wildcard pretrain_prune.py)
KERNELS := $(wildcard csrc/*.py csrc/*.h csrc/*.cpp csrc/*.cu)

.DEFAULT_GOAL := help
.PHONY: help setup docs browser demo demo-source study test test-gpu checks bench report bench-gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

setup: $(INSTALLED) ## .venv with the package and the tools for working on it

# Torch first and by itself: the other packages ask for any torch at all, and an open requirement would be met with
# the newest build instead of the pinned one. pip itself is left as the interpreter brought it. The install compiles
# csrc, or leaves it out; as pip keeps to itself what a build prints, the last line says which kernels there are.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m megatron_prune.ops
	@touch $@

demo: $(INSTALLED) ## the main job on real text: prune, continue, export, compare (about 5 minutes on 2 cores)
	$(BIN)/python tools/demo.py

demo-source: $(INSTALLED) ## make the demo's source model again (examples/demo/source)
	$(BIN)/python tools/make_demo_source.py

test: $(INSTALLED) browser ## all tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests

docs: $(INSTALLED) ## the reference of every module, from its docstrings (build/api/index.html)
	$(BIN)/python -m pdoc --docformat google --no-show-source -o build/api megatron_prune

# Tests open the page about a run in it. Debian and Ubuntu by apt as root; elsewhere it has to be there.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0; \
	fi; \
	echo "make test opens a page in Chromium, which is not installed; on Debian: apt-get install chromium"; exit 1

study: $(INSTALLED) ## the paper's comparisons in miniature, into docs/study.md (about half an hour on 2 cores; continues)
	$(BIN)/python tools/study.py --results examples/study/results.json

# pytest would only say that it found no tests.
test-gpu: $(INSTALLED) ## the tests of the CUDA kernels; needs an NVIDIA GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
		"make test-gpu needs an NVIDIA GPU and there is none here; make test tests everything else")'
	$(BIN)/python -m pytest -q tests/gpu

checks: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)

# The peers are no part of working on the package, so they come with the first benchmark.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(PEERS) ## benchmarks against peers measured in the same process, tables in runs/bench (15 minutes on 2 cores)
	$(BIN)/python benchmarks/report.py --docs runs/bench

report: $(PEERS) ## the same, and docs/performance.md of it
	$(BIN)/python benchmarks/report.py

bench-gpu: $(INSTALLED) ## benchmarks on an NVIDIA GPU: bandwidth of the kernels, MFU, memory, compaction
	$(BIN)/python benchmarks/gpu_kernels.py
	$(BIN)/python benchmarks/gpu_step.py

clean: ## remove everything that make has made: .venv, the demo's runs, caches
	rm -rf $(VENV) runs/demo runs/demo-source build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f megatron_prune/_C*.so megatron_prune/csrc_build.json
	find megatron_prune tools tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
