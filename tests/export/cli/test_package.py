"""What gets installed and under which names, and what importing the kernels needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# A layer may import itself and those to its right.
LAYERS = ("examples", "export", "backends", "kernels")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what setup.py needs, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__")
    for layer in ("executorch_moe", *LAYERS):
        shutil.copytree(ROOT / layer, folder / layer, ignore=ignore)
    shutil.copytree(ROOT / "tests" / "export", folder / "tests" / "export", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_wheel_holds_the_layers_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    # setuptools' own back end, called in this environment: no network, no environment of its own.
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    version = metadata.version("executorch-moe")
    assert top == {"executorch_moe", f"executorch_moe-{version}.dist-info"}
    inside = {name.split("/")[1] for name in names if name.startswith("executorch_moe/")}
    assert inside == {*LAYERS, "__init__.py", "_moved.py", "py.typed"}
    for layer in LAYERS:
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / layer).rglob("*.py")}
        assert {f"executorch_moe/{module}" for module in modules} <= set(names), layer
    for model in ("demo", "tiny"):
        data = {path.name for path in (ROOT / "examples" / model / "checkpoint").iterdir()}
        assert {f"executorch_moe/examples/{model}/checkpoint/{name}" for name in data} <= set(names)
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.json")}
    assert {f"executorch_moe/{table}" for table in tables} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--editable"]], ids=["install", "editable"])
def test_pip_install_in_an_empty_environment(sources: Path, tmp_path: Path, options: list[str]) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    # setuptools comes from this environment: the test needs no network.
    site = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with_setuptools = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(__import__("setuptools").__file__))}
    subprocess.run(
        [*pip, "--no-build-isolation", *options, str(sources)], check=True, capture_output=True, env=with_setuptools
    )
    code = (
        "import importlib.util as u, executorch_moe.examples.tiny as t, executorch_moe.export as e\n"
        "print(e.__file__); print(t.__file__)\n"
        "assert not any(u.find_spec(name) for name in ('kernels', 'backends', 'export', 'examples', 'tests'))"
    )
    found = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    home = str(sources) if options else site
    assert all(line.startswith(home) for line in found.splitlines())
    assert (environment / "bin" / "executorch-moe").exists()


def test_kernels_need_torch_and_triton_only() -> None:
    code = (
        "import sys, executorch_moe.kernels\n"
        "bad = {'executorch', 'transformers', 'torchao', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


@pytest.mark.slow
def test_transformers_may_look_for_a_package_called_kernels() -> None:
    """With the repository's root on sys.path that is our folder; importing it must not register a second operator."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import torch, executorch_moe.kernels\n"
        "operator = torch.ops.executorch_moe.fused_experts.default\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "assert 'kernels.op' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
