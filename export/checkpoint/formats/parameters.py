"""Parameters that a configuration declares for its format, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BITS = 4


class Declared(Mapping[str, Any]):
    """The declaration of a format: a JSON object, and the file that has it.

    Attributes:
        folder: of the model.
        file: name of the file.
    """

    def __init__(self, values: Mapping[str, Any], folder: Path, file: str) -> None:
        self.folder, self.file = folder, file
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.file

    def within(self, values: object) -> Declared:
        """An object inside this one; empty if `values` is not an object."""
        return Declared(values if isinstance(values, Mapping) else {}, self.folder, self.file)


def choice(declared: Declared, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """A parameter that must have one of some values.

    Raises:
        NotImplementedError: another value.
    """
    value = declared.get(key)
    value = default if value is None else value
    value = value.lower() if isinstance(value, str) else value
    if isinstance(value, bool) or value not in known:
        raise NotImplementedError(
            f"the weights in {declared.folder} are quantized with {key}={value!r} of {declared.file}, which is not "
            f"supported yet (only {', '.join(map(repr, known))}): use another version of the model, or the model in "
            "bf16"
        )
    return value


def flag(declared: Declared, key: str, *, default: bool) -> bool:
    """A parameter that is true or false.

    Raises:
        ValueError: it is something else.
    """
    value = declared.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} in {declared.path} must be true or false: use the published file")
    return value


def group_size_of(declared: Declared) -> int:
    """The group size; 0 for one group per row, which is declared as -1 or null.

    Raises:
        ValueError: it is not a whole number of at least 1.
    """
    value = declared.get("group_size")
    if value is None or value == -1:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"group_size={value!r} in {declared.path} must be a whole number of at least 1, or -1: use the published "
            "file"
        )
    return value
