# `make help` lists the targets: each has its line behind `##`. Variables that are set with ?= can be given on the command
# line, as in `make test JOBS=8`.

PYTHON ?= python3
GPU_PYTHON ?= python3
GPU_PYTEST_FLAGS ?=
# torch is named first and alone, so that pip takes this build and does not choose another one with the dependencies.
# On a GPU machine, name its CUDA build: make demo TORCH="torch==2.11.0+cu130 --index-url ..."
# Packages that another build installs (Triton, setuptools, ...) are kept; all others come from constraints.txt.
PINNED_TORCH := torch==2.13.0
TORCH ?= $(PINNED_TORCH)
# Knows --build-constraint, which pins setuptools where packages are built.
PIP ?= pip==26.3
# Resolves constraints.txt for all Pythons and platforms at once.
UV ?= uv==0.13.9
# pytest processes; the suite is CPU-bound
JOBS ?= 2
PYTEST_FLAGS ?= --timeout 900

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo
DEMO_MODEL ?= demo
PROMPT ?= Once upon a time there was a
# what `make export-check` exports for
GPU_TARGETS ?= sm_80,sm_90

# constraints.txt has the newest transformers of the range in pyproject.toml; this is the oldest, and what it needs that
# is not in constraints.txt.
OLDEST_TRANSFORMERS ?= 5.17.0
OLDEST_HUB ?= huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
OLD_TRANSFORMERS := build/transformers-$(OLDEST_TRANSFORMERS)

# GPU machines often have an older Triton: tests that read what its compiler makes of the kernels run with both.
OLDEST_TRITON ?= 3.6.0
OLDEST := build/triton-$(OLDEST_TRITON)

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --durations 10 $(PYTEST_FLAGS)
OLD_PATHS = $(CURDIR)/$(OLDEST):$(CURDIR)/$(OLD_TRANSFORMERS)

# Tests start many Python processes, each of which would compile this package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-full lint mypy export-check test-gpu sanitize constraints install clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## install into .venv, export the small trained model, generate text (on the GPU if there is one)
	$(BIN)/executorch-moe export $(DEMO_MODEL) -o $(DEMO)/$(DEMO_MODEL).pte --target auto
	$(BIN)/executorch-moe generate $(DEMO)/$(DEMO_MODEL).pte --prompt "$(PROMPT)" --max-new-tokens 200 --temperature 0.7 --top-p 0.9

# Three runs, because Triton decides at import whether kernels are compiled or interpreted, and because both ends of the
# ranges of Triton and transformers are tested. The main run has the newest versions, those of constraints.txt (on Python
# 3.10: transformers 5.20.2), and one file after the other in each process, the slowest first (tests/conftest.py). The other
# runs name the only folders with their markers, because collecting the rest takes longer than the selection saves.
# They give a process one test at a time, so that no process idles at the end.
# $(call TESTS,MARKERS) runs those tests that also have these markers.
define TESTS
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and $(1)" --maxschedchunk 1 tests/kernels
	$(PYTEST) -m "not gpu and not interpreter and $(1)" --dist loadfile --no-loadscope-reorder
	PYTHONPATH=$(OLD_PATHS) $(BIN)/python -c "import triton, transformers as t; \
	  assert (triton.__version__, t.__version__) == ('$(OLDEST_TRITON)', '$(OLDEST_TRANSFORMERS)'), (triton, t)"
	PYTHONPATH=$(OLD_PATHS) $(PYTEST) -m "(compiler or transformers) and $(1)" --maxschedchunk 1 tests/kernels tests/export
endef

# mypy and pip take one core each.
test: $(STAMP)  ## lint, type-check, test all that needs no GPU: about 20 minutes
	+$(MAKE) --jobs 2 --output-sync=target lint $(OLDEST)/.installed $(OLD_TRANSFORMERS)/.installed
	$(call TESTS,not exhaustive)

test-full: test  ## the same and further combinations of what it tests, as CI does
	$(call TESTS,exhaustive)

$(OLDEST)/.installed: | $(STAMP)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	touch $@

$(OLD_TRANSFORMERS)/.installed: | $(STAMP)
	rm -rf $(OLD_TRANSFORMERS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLD_TRANSFORMERS) \
	  transformers==$(OLDEST_TRANSFORMERS) $(OLDEST_HUB)
	touch $@

lint: $(STAMP) mypy  ## ruff, mypy and codespell, the same checks as in .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# mypy does not read setup.py's mapping of folders to packages: links lay the folders out as the import package.
mypy: $(STAMP)  ## the type checker alone
	@mkdir -p build/mypy/executorch_moe
	@for part in kernels backends export examples; do ln -sfn ../../../$$part build/mypy/executorch_moe/$$part; done
	@for file in __init__.py _moved.py py.typed; do ln -sfn ../../../executorch_moe/$$file build/mypy/executorch_moe/$$file; done
	$(BIN)/mypy

export-check: $(STAMP)  ## what CI can check without a GPU: export the model for GPUs and inspect it; export for the CPU and run
	$(BIN)/executorch-moe export $(DEMO_MODEL) -o $(DEMO)/cuda.pte --target $(GPU_TARGETS) --report $(DEMO)/cuda.report.json
	$(BIN)/executorch-moe inspect $(DEMO)/cuda.pte --target $(GPU_TARGETS)
	$(BIN)/executorch-moe export $(DEMO_MODEL) -o $(DEMO)/cpu.pte --target cpu
	$(BIN)/executorch-moe generate $(DEMO)/cpu.pte --prompt "$(PROMPT)" --max-new-tokens 32

# Installs nothing but this package: torch, Triton and transformers are those of the environment. The record is
# benchmarks/results/DATE-gpu.txt and names the versions and the GPU. Commit it with a row in the index beside it.
test-gpu:  ## in the active Python environment (CUDA build of torch): run the tests that need a GPU, write a record
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m benchmarks.gpu_tests $(GPU_PYTEST_FLAGS)

# One tool a run: memcheck, racecheck or initcheck. The record is benchmarks/results/DATE-TOOL.txt.
TOOL ?= memcheck
sanitize:  ## in the active Python environment: GPU tests of the kernels under compute-sanitizer (TOOL=racecheck, initcheck)
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m benchmarks.sanitizers $(TOOL) $(GPU_PYTEST_FLAGS)

# Needs a package index. Installs only uv, in an environment of its own.
constraints:  ## write constraints.txt again, with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet $(UV)
	(sed -n '/^# /p' constraints.txt; \
	  echo "$(PINNED_TORCH)" | build/uv/bin/uv pip compile pyproject.toml - --extra test --extra bench --universal \
	    --python-version 3.10 --no-annotate --no-header --quiet) > build/constraints.txt
	mv build/constraints.txt constraints.txt

install: $(STAMP)  ## make .venv with the versions of constraints.txt

# Runs again only when the requirements change, and then in an empty environment: the freeze below must list only the
# packages that torch installs.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP)
	$(BIN)/python -m pip install $(TORCH) $(if $(filter-out $(PINNED_TORCH),$(TORCH)),,-c constraints.txt)
	$(BIN)/python -m pip freeze --all | grep == > $(VENV)/with-torch.txt
	awk '{ name = tolower($$0); sub(/[ =].*/, "", name); gsub(/[-_.]+/, "-", name) } \
	  NR == FNR { known[name]; print } NR != FNR && !/^ *#/ && !(name in known)' \
	  $(VENV)/with-torch.txt constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --build-constraint constraints.txt -e ".[test,bench]"
	touch $@

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist $(DEMO) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
