"""Installed packages are compared with the requirements, in every function that a Python caller starts with."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from torch import nn

from executorch_moe.backends import versions
from executorch_moe.backends.lower import lower
from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.models import attention, experts_interface
from executorch_moe.export.quantize.experts import quantize_experts_


def with_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else real(name))


def test_every_requirement_is_checked() -> None:
    pins = {pin.name: pin for pin in versions.pins()}
    assert {"torch", "executorch", "torchao", "triton", "transformers"} <= pins.keys()
    assert pins["transformers"].optional and not pins["torch"].optional
    # Only the extra `hf` is checked. Each package except this one has a range with two ends.
    assert "pytest" not in pins
    for pin in pins.values():
        assert pin.name == "packaging" or len(Requirement(pin.wanted).specifier) == 2, pin
    versions.check_versions("transformers", "tokenizers", "safetensors")


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.11.0+cu130", "2.13.0a0+git1234567", "2.12.1"])
def test_builds_of_a_version_in_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "torch", version)
    versions.check_versions()


CALLS: dict[str, Callable[[], object]] = {
    "quantize_experts_": lambda: quantize_experts_(nn.Linear(2, 2)),
    "lower": lambda: lower({}, "cpu"),
    "load": lambda: load("none.pte"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_python_caller_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "executorch", "1.4.0")
    with pytest.raises(
        RuntimeError, match=r"executorch 1\.4\.0 is installed, but .* works with executorch>=1\.5\.1,<1"
    ):
        CALLS[name]()
    monkeypatch.undo()
    # An unused optional package does not matter.
    with_version(monkeypatch, "transformers", "4.0")
    with pytest.raises((ValueError, FileNotFoundError)):
        CALLS[name]()


@pytest.mark.parametrize("register", [attention.register, experts_interface.register])
def test_where_transformers_is_used_first(register: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "transformers", "5.16.0")
    with pytest.raises(RuntimeError, match=r"transformers 5\.16\.0 is installed, but executorch-moe works with"):
        register()


def test_without_metadata_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution")
    with_version(monkeypatch, "torch", "1.0")
    versions.check_versions()
