"""Names of options in error messages: the package's errors have Python names, the command line shows `--options`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_ASSIGNED = re.compile(r"""(?<![\w.,-])(\w+)=(?:(True|False)\b|(?=(['"]|-?\d)))""")
_BARE = re.compile(r"(?<![\w./=-])([a-z]+_[a-z_]+)(?![\w./=(])")
_LAYER_NAMES = ("lm_head",)
"""Options that have the name of a layer; alone in a message, it means the layer."""


def with_option_names(message: str, root: Any, given: dict[str, Any]) -> str:
    """A message with `--group-size 48` instead of `group_size=48`.

    Args:
        message: of an error.
        root: the click command of the application; options of all its commands are replaced.
        given: the arguments and options of the command that failed.
    """
    options = dict(_options(root))

    def assigned(match: re.Match[str]) -> str:
        name, flag, start = match[1], match[2], match[3]
        if name not in options or _is_field(name, start, given):
            return match[0]
        return options[name] if flag else f"{options[name]} "

    def bare(match: re.Match[str]) -> str:
        return match[1] if match[1] in _LAYER_NAMES else options.get(match[1], match[1])

    return _BARE.sub(bare, _ASSIGNED.sub(assigned, message))


def _is_field(name: str, start: str | None, given: dict[str, Any]) -> bool:
    """True if a name is a field of a synthetic model: some have the names of options."""
    if name == "experts":
        return start not in ("'", '"')
    return name == "layers" and given.get("layers") is None


def _options(command: Any) -> Iterator[tuple[str, str]]:
    """Python name -> option, of a command and those below it."""
    for param in command.params:
        if longs := [opt for opt in param.opts if opt.startswith("--")]:
            yield param.name, longs[0]
            yield from ((opt.removeprefix("--").replace("-", "_"), opt) for opt in longs)
    for child in getattr(command, "commands", {}).values():
        yield from _options(child)
