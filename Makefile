# make demo       install into .venv, export the tiny model, generate text (on the GPU if there is one)
# make test       install into .venv, lint, type-check, run every test that needs no GPU
# make test-gpu   in the active Python environment (CUDA build of torch): run the tests that need a GPU
# make export-check  what CI can do of a GPU export: export the tiny model, inspect it; export for the CPU, run
# make sanitize   in the active Python environment: GPU tests of the kernels under compute-sanitizer (TOOL=racecheck, ...)
# make lint       ruff and mypy only
# make constraints  write constraints.txt again, with the newest versions that pyproject.toml allows
# make clean      remove .venv and everything built

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
# what `make export-check` exports for
GPU_TARGETS ?= sm_80,sm_90
PROMPT ?= The import statement

# constraints.txt has the newest transformers of the range in pyproject.toml; this is the oldest, and what it needs that
# is not in constraints.txt.
OLDEST_TRANSFORMERS ?= 5.17.0
OLDEST_HUB ?= huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
OLD_TRANSFORMERS := build/transformers-$(OLDEST_TRANSFORMERS)

# GPU machines often have an older Triton: tests that read what its compiler makes of the kernels run with both.
OLDEST_TRITON ?= 3.6.0
OLDEST := build/triton-$(OLDEST_TRITON)

.PHONY: demo test test-gpu sanitize export-check lint constraints clean install
.DELETE_ON_ERROR:

install: $(STAMP)

# Runs again only when the requirements change, in an emptied environment: the freeze below must list only what torch
# brings along.
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

# In an environment of its own; needs a package index, and nothing is installed but uv.
constraints:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet $(UV)
	(sed -n '/^# /p' constraints.txt; \
	  echo "$(PINNED_TORCH)" | build/uv/bin/uv pip compile pyproject.toml - --extra test --extra bench --universal \
	    --python-version 3.10 --no-annotate --no-header --quiet) > build/constraints.txt
	mv build/constraints.txt constraints.txt

demo: $(STAMP)
	$(BIN)/executorch-moe export tiny -o $(DEMO)/tiny.pte --target auto
	$(BIN)/executorch-moe generate $(DEMO)/tiny.pte --prompt "$(PROMPT)" --max-new-tokens 200 --temperature 0.6

# What CI can do for a GPU export without a GPU.
export-check: $(STAMP)
	$(BIN)/executorch-moe export tiny -o $(DEMO)/cuda.pte --target $(GPU_TARGETS) --report $(DEMO)/cuda.report.json
	$(BIN)/executorch-moe inspect $(DEMO)/cuda.pte --target $(GPU_TARGETS)
	$(BIN)/executorch-moe export tiny -o $(DEMO)/cpu.pte --target cpu
	$(BIN)/executorch-moe generate $(DEMO)/cpu.pte --prompt "$(PROMPT)" --max-new-tokens 32

# mypy does not read setup.py's mapping: links lay the folders out as the import package.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/mypy/executorch_moe
	@for part in kernels backends export examples; do ln -sfn ../../../$$part build/mypy/executorch_moe/$$part; done
	@for file in __init__.py _moved.py py.typed; do ln -sfn ../../../executorch_moe/$$file build/mypy/executorch_moe/$$file; done
	$(BIN)/mypy

# Four runs, for Triton decides at import whether kernels are compiled or interpreted, and there are two Tritons and two
# transformers: the main run is with the one in constraints.txt, the newest of the range (on Python 3.10: 5.20.2).
test: lint $(OLDEST)/.installed $(OLD_TRANSFORMERS)/.installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter -n $(JOBS) $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m "not gpu and not interpreter" -n $(JOBS) --dist loadgroup $(PYTEST_FLAGS)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -m compiler -n $(JOBS) $(PYTEST_FLAGS)
	PYTHONPATH=$(CURDIR)/$(OLD_TRANSFORMERS) $(BIN)/python -c \
	  "import transformers as t; assert t.__version__ == '$(OLDEST_TRANSFORMERS)', t"
	PYTHONPATH=$(CURDIR)/$(OLD_TRANSFORMERS) $(BIN)/python -m pytest -m transformers -n $(JOBS) $(PYTEST_FLAGS)

$(OLDEST)/.installed: | $(STAMP)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	touch $@

$(OLD_TRANSFORMERS)/.installed: | $(STAMP)
	rm -rf $(OLD_TRANSFORMERS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLD_TRANSFORMERS) \
	  transformers==$(OLDEST_TRANSFORMERS) $(OLDEST_HUB)
	touch $@

# The environment's own torch, Triton and transformers are used as they are: nothing but this package is installed.
# The results file names the versions and the GPU; commit it.
test-gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) tests/gpu_results.py $(GPU_PYTEST_FLAGS)

# One tool a run: memcheck, racecheck or initcheck. The record is tests/results/DATE-TOOL.txt; commit it.
TOOL ?= memcheck
sanitize:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) tests/gpu_sanitizers.py $(TOOL) $(GPU_PYTEST_FLAGS)

clean:
	rm -rf $(VENV) build dist $(DEMO) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
