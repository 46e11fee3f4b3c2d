"""The functions that a delegate's library finds at load: of ExecuTorch's CUDA runtime, CUDA, and system libraries.

Source for those of the runtime: ExecuTorch (August 2026), headers in backends/cuda/runtime/shims, common_shims_slim.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram

from .elf import ElfImage, UndefinedSymbol

_CREATE = "create_tensor_from_blob", "create_tensor_from_blob_v2", "empty_strided", "new_tensor_handle"
_COPY = "_reinterpret_tensor", "assign_tensors_out", "clone", "clone_preserve_strides", "copy_", "delete_tensor_object"
_GET = (
    *("data_ptr", "device_index", "device_type", "dim", "dtype", "numel", "sizes", "storage_offset", "storage_size"),
    *("strides", "current_cuda_stream"),
)
_DTYPES = "bfloat16", "bool", "float16", "float32", "int16", "int32", "int64", "int8", "uint8"
_GUARDS = "create_cuda_guard", "create_cuda_stream_guard", "delete_cuda_guard", "delete_cuda_stream_guard"
_OPERATORS = (
    *("_weight_int4pack_mm", "int4_plain_mm", "int5_plain_mm", "int6_plain_mm", "int8_plain_mm"),
    *("rand", "randint_low_out", "sort_stable", "guard_set_index"),
)
_OTHERS = "check", "warn", "item_bool", "layout_strided", "grad_mode_is_enabled", "grad_mode_set_enabled"

RUNTIME_SHIMS = frozenset(
    f"aoti_torch_{name}"
    for name in (
        *(*_CREATE, *_COPY, *_GUARDS, *_OTHERS),
        *(f"get_{name}" for name in _GET),
        *(f"dtype_{name}" for name in _DTYPES),
        *(f"device_type_{name}" for name in ("cpu", "cuda")),
        *(f"cuda_{name}" for name in _OPERATORS),
    )
)
"""AOTInductor shims that the runtime has. A delegate that calls another one does not load."""

# Prefixes of the symbol versions of libc, libm, libstdc++ and libgcc.
_SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
_LANGUAGE_RUNTIME = ("_ITM_", "_ZGTt", "__cxa_", "__gmon_start__")
"""Prefixes of weak symbols that parts of libgcc and libstdc++ leave in a library: start-up, transactions, C++ ABI."""


def foreign_symbols(undefined: Iterable[UndefinedSymbol]) -> tuple[str, ...]:
    """Undefined symbols that no library at load defines, sorted."""
    return tuple(sorted({symbol.name for symbol in undefined if not _is_promised(symbol)}))


def missing_functions(program: ExportedProgram) -> tuple[str, ...]:
    """Functions that the delegates of a lowered program call and that no library at load defines, sorted.

    ExecuTorch's own check misses some calls of AOTInductor (torch 2.13: scatter_reduce). Without this check, such a
    delegate would be written and fail to load.
    """
    return tuple(sorted({name for library in _libraries(program) for name in _foreign(library)}))


def _foreign(library: bytes) -> tuple[str, ...]:
    return foreign_symbols(ElfImage(memoryview(library)).undefined_symbols())


def _libraries(program: ExportedProgram) -> Iterator[bytes]:
    for module in program.graph_module.modules():
        if isinstance(module, LoweredBackendModule) and (store := module.named_data_store_output) is not None:
            for data in (store.pte_data, *store.external_data.values()):
                for key, entry in data.items():
                    if key.endswith("_so_blob"):
                        yield bytes(store.buffers[entry.buffer_index])


def _is_promised(symbol: UndefinedSymbol) -> bool:
    if symbol.version:
        return symbol.version.startswith(_SYSTEM_VERSIONS)
    if symbol.name in RUNTIME_SHIMS or symbol.name.startswith("cuda"):
        return True
    if symbol.name.startswith("cu") and symbol.name[2:3].isupper():  # the driver API
        return True
    return symbol.weak and symbol.name.startswith(_LANGUAGE_RUNTIME)
