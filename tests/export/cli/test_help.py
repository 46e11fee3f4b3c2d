"""Help, versions and doctor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from executorch_moe.export.cli.app import app

from .refusals import refused, runner


@pytest.mark.parametrize(
    "command", [[], ["export"], ["generate"], ["bench"], ["bench", "model"], ["inspect"], ["doctor"]]
)
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "import executorch_moe.export.cli\n"
        "assert not {'torch', 'executorch', 'transformers', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.exhaustive  # the processes of test_damaged_artifact.py are quiet too
def test_tune_keeps_other_packages_quiet(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "executorch_moe.export.cli",
        "tune",
        "--shape",
        "qwen35",
        "--layers",
        "0",
        "--out",
        str(tmp_path / "t"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "error: --layers 0 must be at least 1\n"


def test_doctor_names_versions_and_runtimes() -> None:
    result = runner.invoke(app, ["doctor"], terminal_width=200)
    assert result.exit_code in (0, 1)
    for name in ("torch", "executorch", "triton", "torchao", "transformers", "GPU", "ptxas", "delegate host"):
        assert name in result.stdout


def test_doctor_says_what_to_do_about_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from executorch_moe.export import doctor

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "torchao" else real(name))
    wrong = [check for check in doctor.pins() if check.status == doctor.FAIL]
    assert [check.name for check in wrong] == ["torchao"]
    assert wrong[0].remedy == "works with torchao>=0.18,<0.19: pip install 'torchao>=0.18,<0.19'"


def test_doctor_with_packages_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is shown whatever a package of another version does."""

    def broken(*_: object) -> None:
        raise AttributeError("module has no attribute 'x'\nmore")

    from executorch_moe.backends.cuda.cross import target as cross_compile
    from executorch_moe.export import doctor

    monkeypatch.setattr(cross_compile, "check_target", broken)
    result = runner.invoke(app, ["doctor"], terminal_width=200)
    assert result.exit_code == 1 and "delegate host" in result.stdout
    (check,) = [check for check in doctor.run_checks() if check.name == "export for other GPUs"]
    assert (check.status, check.found) == (doctor.FAIL, "AttributeError: module has no attribute 'x'")


WITH_OTHER_VERSIONS = """
import sys
from importlib import metadata
real = metadata.version
_, package, given = sys.argv[:3]
def version(name):
    if name != package:
        return real(name)
    if given == "none":
        raise metadata.PackageNotFoundError(name)
    return given
metadata.version = version
del sys.argv[1:3]
from executorch_moe.export.cli import main
main()
"""


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("torch", "2.10.0", "torch 2.10.0 is installed, but executorch-moe works with torch>=2.11,<2.14: pip install"),
        ("triton", "3.8.0", "triton 3.8.0 is installed, but executorch-moe works with triton>=3.6,<3.8: pip install"),
        ("executorch", "none", "executorch is not installed: pip install 'executorch>=1.5.1,<1.6'"),
        ("torchao", "0.17.0", "torchao 0.17.0 is installed, but executorch-moe works with torchao>=0.18,<0.19: pip"),
        pytest.param(
            "transformers",
            "5.99.0",
            "transformers 5.99.0 is installed, but executorch-moe works with transformers>=5",
            marks=pytest.mark.exhaustive,  # twelve seconds
        ),
        ("transformers", "none", "transformers is not installed: pip install 'executorch-moe[hf]'"),
    ],
)
def test_other_versions_are_one_line_before_anything_else(
    package: str, version: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.pte"
    command = [sys.executable, "-c", WITH_OTHER_VERSIONS, package, version, "export", "none", "-o", str(out)]
    result = subprocess.run([*command, "--target", "cpu"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith(f"error: {message}") and len(result.stderr.splitlines()) == 1
    # Its help is shown all the same.
    assert subprocess.run([*command[:-3], "--help"], capture_output=True).returncode == 0


def test_several_other_versions_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name in ("torch", "torchao") else real(name))
    line = refused("inspect", "none.pte")
    assert "torch 0.1 is installed" in line and "; torchao 0.1 is installed" in line


def test_versions_are_one_line_each() -> None:
    from importlib import metadata

    result = runner.invoke(app, ["--version"])
    names = ("executorch-moe", "torch", "executorch", "triton", "transformers")
    assert result.exit_code == 0 and result.stdout.splitlines() == [f"{n} {metadata.version(n)}" for n in names]
