"""Compares installed packages with the version ranges in this package's metadata (from pyproject.toml)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "executorch-moe"
HUGGING_FACE = ("transformers", "tokenizers", "safetensors")
"""Packages of the extra `hf`, which exports of Hugging Face models need."""


@dataclass(frozen=True)
class Pin:
    """A required package.

    Attributes:
        name: of the package. wanted: name and range, as for `pip install`.
        version: the installed version, or None.
        fits: True if the installed version is in the range.
        optional: True if only the extra `hf` requires it.
    """

    name: str
    wanted: str
    version: str | None
    fits: bool
    optional: bool

    @property
    def problem(self) -> str:
        """What is wrong and the remedy; empty if the version fits."""
        if self.fits:
            return ""
        if self.version is None:
            return f"{self.name} is not installed: {self.remedy}"
        return f"{self.name} {self.version} is installed, but {DISTRIBUTION} works with {self.wanted}: {self.remedy}"

    @property
    def remedy(self) -> str:
        """The command that installs a version in the range."""
        missing_extra = self.optional and self.version is None
        return f"pip install '{DISTRIBUTION}[hf]'" if missing_extra else f"pip install '{self.wanted}'"


def pins() -> Iterator[Pin]:
    """The packages that this package and its extra `hf` require on this machine.

    Raises:
        importlib.metadata.PackageNotFoundError: this package is not installed.
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        marker = requirement.marker
        required = marker is None or marker.evaluate({"extra": ""})
        if required or (marker is not None and marker.evaluate({"extra": "hf"})):
            yield _pin(requirement, optional=not required)


def _pin(requirement: Requirement, optional: bool) -> Pin:
    wanted = requirement.name + ",".join(sorted(map(str, requirement.specifier), reverse=True))  # ">=1,<2"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Pin(requirement.name, wanted, None, False, optional)
    # Local and nightly builds are pre-releases.
    fits = requirement.specifier.contains(version, prereleases=True)
    return Pin(requirement.name, wanted, version, fits, optional)


def check_versions(*optional: str) -> None:
    """Check every required package, and the named optional ones, before they are imported.

    Checks nothing where this package itself is not installed: then there are no ranges.

    Raises:
        RuntimeError: packages are missing or outside their range. The message names all of them, with remedies.
    """
    try:
        wrong = [pin.problem for pin in pins() if not pin.fits and (not pin.optional or pin.name in optional)]
    except metadata.PackageNotFoundError:
        return
    if wrong:
        raise RuntimeError("; ".join(wrong))
