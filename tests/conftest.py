"""Shared by all tests: seeds, a bound on threads, and a reason when a GPU test is skipped."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# With the repository's root on sys.path (`python -m pytest`), transformers' look for the Hub's package `kernels` would
# find and import our folder of that name, and so register the operator a second time over the one in use.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# Before torch starts its pools: the suite runs several processes side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is ever downloaded by a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@functools.cache
def why_no_gpu() -> str:
    """Empty if GPU tests can run here, else the reason why not."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return ""


# First: pytest-xdist's hook, which reads the groups, is registered after this file and would otherwise run before it.
# With pytest 9.2, xdist 3.8 does not group at all: nothing may depend on it but the time that a run takes.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Asked for by name, they run and say what is wrong.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" or "interpreter" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("interpreter") and not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, with which Triton must be imported"))
        if {"exported", "crossed"} & set(getattr(item, "fixturenames", ())):
            # An export is shared by the tests of one file and scheme: under --dist loadgroup one process runs them.
            params = getattr(getattr(item, "callspec", None), "params", {})
            scheme = params.get("exported") or params.get("crossed") or params.get("scheme", "")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{scheme}"))
        if item.get_closest_marker("gpu") and why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why_no_gpu()}"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Same numbers for each test, whatever ran before it."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """made_once(name, make) -> a folder that make(folder) has filled, once for all tests and processes of a run.

    What could not be made is not tried again by every test that wants it.
    """
    base = tmp_path_factory.getbasetemp()
    # With several processes, each has a base folder of its own below a common one.
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    common.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done, failed = common / name, common / f"{name}.done", common / f"{name}.failed"
        with FileLock(common / f"{name}.lock"):
            if failed.is_file():
                pytest.fail(f"{name} could not be made, another test says why: {failed.read_text()}", pytrace=False)
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
