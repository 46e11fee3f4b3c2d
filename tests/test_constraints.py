"""constraints.txt, the Makefile and .pre-commit-config.yaml agree with the requirements in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from executorch_moe.backends import versions

from .conftest import SLOW_FILES

ROOT = Path(__file__).resolve().parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}


def pinned(python: str) -> dict[str, str]:
    """Package -> version for a Python on Linux."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, LINES):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} has two versions for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "==" and "*" not in pin.version, requirement
            found[name] = pin.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_version_in_its_range(python: str) -> None:
    found = pinned(python)
    for pin in versions.pins():
        wanted = Requirement(pin.wanted)
        assert wanted.specifier.contains(found[canonicalize_name(wanted.name)]), (wanted, python)
    for name in ("pytest", "ruff", "mypy", "codespell", "hypothesis", "matplotlib", "setuptools"):
        assert name in found


def test_both_ends_of_the_range_of_transformers_are_run() -> None:
    """constraints.txt pins the newest version, the Makefile names the oldest."""
    (pin,) = (pin for pin in versions.pins() if pin.name == "transformers")
    bounds = {str(bound.operator): bound.version for bound in Requirement(pin.wanted).specifier}
    makefile = (ROOT / "Makefile").read_text()
    oldest = re.search(r"^OLDEST_TRANSFORMERS \?= (\S+)$", makefile, re.M)
    assert oldest is not None and oldest[1] == f"{bounds['>=']}.0"
    major, minor = map(int, bounds["<"].split("."))
    assert pinned("3.11")["transformers"].startswith(f"{major}.{minor - 1}.")
    torch = re.search(r"^PINNED_TORCH := torch==(\S+)$", makefile, re.M)
    assert torch is not None and torch[1] == pinned("3.11")["torch"]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    """Both call the tools in .venv, so that their versions are those of constraints.txt."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert recipe is not None and re.search(r"^lint:.* mypy ", makefile, re.M)
    lines = (line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines())
    linted = {line.removesuffix(" .").removesuffix(" --check") for line in lines}
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = re.findall(r"^ *entry: (.*)$", config, re.M)
    assert {hook.removesuffix(" --force-exclude") for hook in hooks} - {"make --no-print-directory mypy"} == linted
    assert "make --no-print-directory mypy" in hooks and config.count("language: system") == len(hooks)


@pytest.mark.parametrize(
    ("marker", "folder"), [("interpreter", "kernels"), ("compiler", "kernels"), ("transformers", "export")]
)
def test_markers_are_in_the_folder_that_make_test_names(marker: str, folder: str) -> None:
    """The runs for these markers collect only the folders named in the Makefile."""
    runs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(PYTEST) -m" in line]
    (run,) = (run for run in runs if re.search(rf' -m "[(a-z ]*\b{marker}\b', run) and f"not {marker}" not in run)
    assert f" tests/{folder}" in run
    tests = ROOT / "tests"
    marked = [path.relative_to(tests) for path in tests.rglob("test_*.py") if f"mark.{marker}" in path.read_text()]
    assert marked and {path.parts[0] for path in marked} == {folder}


def test_slow_files_exist() -> None:
    assert set(SLOW_FILES) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
