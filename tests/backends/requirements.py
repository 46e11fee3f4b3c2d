"""Requirements of some tests on the machine."""

from __future__ import annotations

import pytest

from executorch_moe.backends.cuda.cross import host_toolchain
from executorch_moe.backends.cuda.cross.replacements import check_versions


def why_no_cross_export() -> str:
    """Empty if this machine can export for a GPU that it does not have, else the reason."""
    if why := host_toolchain.why_no_toolchain():
        return why
    try:
        check_versions()
    except RuntimeError as error:
        return str(error)
    return ""


needs_cross_export = pytest.mark.skipif(bool(why_no_cross_export()), reason=why_no_cross_export())
