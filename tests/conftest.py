"""Shared by all tests: order of files, seeds, a limit on threads, and the reason why a GPU test is skipped."""

from __future__ import annotations

import functools
import gc
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# transformers looks for the Hub's package `kernels`. With the repository's root on sys.path (`python -m pytest`) it
# would import our folder of that name, which registers the operator a second time.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# Set before torch starts its thread pools: the suite runs several processes at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each process compiles kernels itself. With a pool for each there would be more processes than cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# No test downloads anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def gpus_in_turn(worker: str, gpus: int) -> str:
    """All GPUs as CUDA_VISIBLE_DEVICES, first another one for each process of pytest-xdist ("gw0", "gw1", ...)."""
    first = int(worker.removeprefix("gw")) % gpus
    return ",".join(str((first + index) % gpus) for index in range(gpus))


def number_of_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout.count("GPU ")


# Before torch is imported: the processes share the GPUs of a machine evenly, and each still sees all of them. The first
# process counts them for all, so that not each starts nvidia-smi, which wait for each other.
if "CUDA_VISIBLE_DEVICES" not in os.environ:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["EXECUTORCH_MOE_TEST_GPUS"] = str(number_of_gpus())
    elif (_gpus := int(os.environ.get("EXECUTORCH_MOE_TEST_GPUS", "0"))) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus_in_turn(os.environ["PYTEST_XDIST_WORKER"], _gpus)

SLOW_FILES = (
    "test_families.py",  # seven families, each exported in several modes
    "test_cross_export.py",  # exports by name: about 75 s of one core for the tiny model and an architecture
    "test_recurrent_export.py",  # an artifact of a model with recurrent layers: about 50 s
    "test_any_length.py",  # an unmodified model, lowered for the CPU: about 30 s
    "test_export_families.py",  # exports by the command line
    "test_compile.py",  # every tile for an architecture and scheme: about 10 s
    "test_exports.py",  # artifacts of quantized checkpoints
    "test_check.py",  # traces both methods twice for each set of options
    "test_tokens.py",  # exports in each scheme, and eager models beside them
    "test_cpu_target.py",  # about 10 s for each scheme and type
    "test_overlapped_launches.py",
    "test_artifact_files.py",
    "test_generated_kernels.py",
    "test_scripts.py",
    "test_commands.py",
    "test_delta_rule_states.py",  # host code of two methods for CUDA: about 15 s
    "test_quality.py",
    "test_real_model.py",  # after test_tokens.py, which makes the artifact that it serves
    "test_server.py",  # starts six servers
    "test_help.py",  # starts processes that import all packages
)
"""The slow parts of `make test`, slowest first: it runs them in this order, so that no process idles at the end."""
SHORT_FILES = ("test_gpu.py",)
"""Hundreds of tests of seconds."""
_ORDER = {name: position for position, name in enumerate(SLOW_FILES)}


@functools.cache
def why_no_gpu() -> str:
    """Reason why GPU tests cannot run here; empty if they can."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return ""


@functools.cache
def oldest_triton() -> bool:
    """Whether this is the run with the oldest Triton, which compiles for `USUAL_ARCHITECTURES` in `make test`."""
    import triton

    return triton.__version__.startswith("3.6.")


USUAL_ARCHITECTURES = (80, 90)


# tryfirst: pytest-xdist's hook reads the groups, and is registered after this file, so it would run earlier. xdist 3.8
# adds the group to the test's id in a way that pytest 9.2 ignores, so only the time of a run may depend on groups.
# `make test` gives each file to one process (--dist loadfile), in the order of `SLOW_FILES`.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # With `-m interpreter` they run anyway, and fail with the reason.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" or "interpreter" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("interpreter") and not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, with which Triton must be imported"))
        if {"exported", "crossed"} & set(getattr(item, "fixturenames", ())):
            # Tests of one file and scheme share an export: under --dist loadgroup one process runs them.
            params = getattr(getattr(item, "callspec", None), "params", {})
            scheme = params.get("exported") or params.get("crossed") or params.get("scheme", "")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{scheme}"))
        architecture = getattr(getattr(item, "callspec", None), "params", {}).get("capability")
        if architecture not in (None, *USUAL_ARCHITECTURES) and item.get_closest_marker("compiler") and oldest_triton():
            item.add_marker(pytest.mark.exhaustive)
        if item.get_closest_marker("gpu") and why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why_no_gpu()}"))
    # Stable: keeps the order inside a file.
    items.sort(key=lambda item: (_part(item), _ORDER.get(item.path.name, len(_ORDER))))


def _part(item: pytest.Item) -> int:
    """The first, second or third part of a run. In the third, no process waits for another one's last long test."""
    if item.get_closest_marker("late"):
        return 1
    return 2 if item.path.name in SHORT_FILES else 0


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collection: that took a tenth of the time of tracing and lowering."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Gives each test the same random numbers, independent of the tests before it."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def few_gemms() -> Iterator[None]:
    """On a GPU Inductor times two kernels for each GEMM instead of about twenty: most of an export's time there.

    The export whose speed is compared chooses among all of them: `tiny_artifact` in export/conftest.py.
    """
    if why_no_gpu():
        yield
        return
    from torch._inductor import config

    with config.patch({"test_configs.max_mm_configs": 2}):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """made_once(name, make) -> a folder that make(folder) has filled, once for all tests and processes of a run.

    If `make` fails, later calls for this name fail at once with its error.
    """
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has its own base folder below a common one.
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    common.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done, failed = common / name, common / f"{name}.done", common / f"{name}.failed"
        with FileLock(common / f"{name}.lock"):
            if failed.is_file():
                pytest.fail(f"{name} could not be made in an earlier test: {failed.read_text()}", pytrace=False)
            if not done.is_file():
                folder.mkdir()
                try:
                    make(folder)
                except Exception as error:
                    failed.write_text(f"{type(error).__name__}: {error}"[:2000])
                    raise
                done.touch()
        return folder

    return get
