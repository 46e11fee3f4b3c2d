# make demo       install into .venv, export the tiny model, generate text (on the GPU if there is one)
# make test       install into .venv, lint, type-check, run every test that needs no GPU
# make test-gpu   in the active Python environment (CUDA build of torch): run the tests that need a GPU
# make export-check  what CI can do of a GPU export: export the tiny model, inspect it; export for the CPU, run
# make lint       ruff and mypy only
# make clean      remove .venv and everything built

PYTHON ?= python3
GPU_PYTHON ?= python3
GPU_PYTEST_FLAGS ?=
# torch is named first and alone, so that pip takes this build and does not choose another one with the dependencies.
# On a GPU machine, name its CUDA build: make demo TORCH="torch==2.11.0+cu130 --index-url ..."
TORCH ?= torch==2.13.0
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

# GPU machines often have an older Triton: tests that read what its compiler makes of the kernels run with both.
OLDEST_TRITON ?= 3.6.0
OLDEST := build/triton-$(OLDEST_TRITON)

.PHONY: demo test test-gpu export-check lint clean install
.DELETE_ON_ERROR:

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Again only when the requirements change.
$(STAMP): setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[test,bench]"
	touch $@

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
	@for layer in kernels backends export examples; do ln -sfn ../../../$$layer build/mypy/executorch_moe/$$layer; done
	$(BIN)/mypy

# Three runs, for Triton decides at import whether kernels are compiled or interpreted, and there are two Tritons.
test: lint $(OLDEST)/.installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter -n $(JOBS) $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m "not gpu and not interpreter" -n $(JOBS) --dist loadgroup $(PYTEST_FLAGS)
	PYTHONPATH=$(OLDEST) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -m compiler -n $(JOBS) $(PYTEST_FLAGS)

$(OLDEST)/.installed: | $(STAMP)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	touch $@

# The environment's own torch, Triton and transformers are used as they are: nothing but this package is installed.
# The results file names the versions and the GPU; commit it.
test-gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) tests/gpu_results.py $(GPU_PYTEST_FLAGS)

clean:
	rm -rf $(VENV) build dist $(DEMO) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
