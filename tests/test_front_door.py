"""`import executorch_moe`: the public names, and the module names of version 0.1."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import warnings

import pytest

import executorch_moe
from executorch_moe._moved import MOVED, PACKAGE

from .test_architecture import modules, targets


@pytest.mark.parametrize("name", executorch_moe.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(executorch_moe, name) is not None
    assert name in dir(executorch_moe)


def test_the_version_is_that_of_the_distribution() -> None:
    assert executorch_moe.__version__ == importlib.metadata.version("executorch-moe")


def test_an_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(
        AttributeError, match="no attribute 'quantise': public names are Context, Dense, Experts, ExportOptions"
    ):
        executorch_moe.quantise  # noqa: B018


def test_importing_the_package_imports_no_heavy_package() -> None:
    script = "import sys, executorch_moe; print({'torch', 'triton', 'transformers', 'executorch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_names_for_type_checkers_are_the_lazy_ones() -> None:
    for name, home in executorch_moe._HOMES.items():
        assert hasattr(importlib.import_module(f"{PACKAGE}.{home}"), name)
    assert {*executorch_moe._HOMES, "__version__"} == set(executorch_moe.__all__)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_moved_modules_import_by_their_old_names(old: str) -> None:
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    new = importlib.import_module(f"{PACKAGE}.{MOVED[old]}")
    spec = new.__spec__
    with pytest.warns(FutureWarning, match=f"{PACKAGE}.{old} is now {PACKAGE}.{MOVED[old]}"):
        module = importlib.import_module(f"{PACKAGE}.{old}")
    assert module is new and module.__spec__ is spec


def test_old_names_are_not_used_here() -> None:
    """No import statement of the package, inside of functions either, and no name in a string."""
    old = {f"{PACKAGE}.{name}" for name in MOVED}
    wrong, seen = [], set()
    for module, path in modules().items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            names = set(targets(node, package))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(re.findall(rf"\b{PACKAGE}(?:\.\w+)+", node.value))
            parts = [name.split(".") for name in names]
            used = {".".join(part[:length]) for part in parts for length in range(1, len(part) + 1)}
            seen |= used
            wrong += [f"{path}:{getattr(node, 'lineno', 0)}: {name}" for name in used & old]
    assert not wrong, "\n".join(wrong)
    assert {f"{PACKAGE}.backends.runtime.loader", f"{PACKAGE}.export.own_process"} <= seen


@pytest.mark.parametrize(
    "statement",
    [
        "from executorch_moe.backends.artifact import save",
        "from executorch_moe.backends.cpu import MoECpuPartitioner",
        "from executorch_moe.backends.cuda import MoECudaPartitioner",
        "from executorch_moe.backends.cuda.cross_compile import target_cuda",
        "from executorch_moe.backends.fusion import ExpertFuser, FusionOptions",
        "from executorch_moe.backends.runtime import load",
        "from executorch_moe.backends.targets import lower",
        "from executorch_moe.export.experts_interface import register",
        "from executorch_moe.export.generation import TextGenerator",
        "from executorch_moe.export.options import ExportOptions",
        "from executorch_moe.export.pipeline import export_model",
        "from executorch_moe.export.pretrained import resolve",
        "from executorch_moe.export.quantize import quantize_experts_",
        "from executorch_moe.kernels import FusedExperts, PackedExperts, fused_experts, pack_codes, pack_experts",
        "from executorch_moe.kernels.packing import stack_experts, unpack_experts",
    ],
)
def test_documented_imports_of_version_0_1(statement: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exec(statement, {})
