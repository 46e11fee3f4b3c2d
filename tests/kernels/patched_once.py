"""Makes Triton's interpreter replace the functions of `triton.language` once per launch instead of in every call.

The interpreter replaces them at the start of a launch and again in each call of a device function, where nothing is
left to replace. Launches of the grouped GEMM make thousands of such calls. Without the repetition, they take a third
less time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def patched_once() -> Iterator[None]:
    """Context for interpreted launches."""
    stock, patched = interpreter._patch_lang, set()
    nothing = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def modules_of(function: Any) -> frozenset[str]:
        return frozenset(
            module.__name__
            for module in (tl, tl.core)
            if any(value is module for value in function.__globals__.values())
        )

    def patch(function: Any) -> Any:
        modules = modules_of(function)
        if modules <= patched:
            return nothing
        scope = stock(function)
        inside = bool(patched)
        patched.update(modules)
        if inside:  # a device function: the end of the launch restores them
            return scope

        def restore() -> None:
            patched.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    with mock.patch.object(interpreter, "_patch_lang", patch):
        yield
