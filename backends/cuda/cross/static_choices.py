"""Choices that Inductor normally makes by timing on the GPU: kernel configurations by name, GEMM templates by score."""

from __future__ import annotations

import ast
import contextlib
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from executorch_moe.backends.cuda.patches.registry import CROSS, replacing
from executorch_moe.kernels.gpus import GpuModel

from . import kernel_configs
from .report import CrossCompileReport, GemmChoice, KernelChoice

UNKNOWN_SIZE = 1536
"""Assumed value of sizes that are known only at run time: tokens of a long prompt. Short prompts cost little anyway."""


class StaticChoices:
    """Makes the choices for one target and records them in its report.

    Attributes:
        method: the method that is being compiled.
    """

    def __init__(self, report: CrossCompileReport) -> None:
        self.report = report
        self.method = ""

    def compile_kernels(self, wrapper: Any) -> None:
        """Replaces `PythonWrapperCodegen.generate_and_run_autotune_block`: compiles one configuration that fits.

        Raises:
            RuntimeError: a kernel does not compile for the target, or needs more shared memory than it has.
        """
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner, NoTritonConfigsError

        wrapper.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile\n")
        scope: dict[str, Any] = {}
        stock, listed = CachingAutotuner.precompile, {}

        def wait(tuner: Any, *args: Any, **kwargs: Any) -> None:
            """Replaces `CachingAutotuner.precompile` while kernels are defined; they are compiled together later."""

        def precompile(tuner: Any, *args: Any, **kwargs: Any) -> None:
            if tuner.configs is not None:  # not compiled yet
                listed[tuner] = list(tuner.configs)
                known = kernel_configs.choose_config(_kernel_name(tuner), listed[tuner])
                tuner.configs = listed[tuner] if known is None else [known]
            try:
                stock(tuner, *args, **kwargs)
            except NoTritonConfigsError:
                if tuner.configs == listed[tuner]:
                    raise
                tuner.configs = listed[tuner]  # the known configuration does not fit
                stock(tuner, *args, **kwargs)

        try:
            with replacing(CROSS) as replace:
                replace("torch._inductor.runtime.triton_heuristics:CachingAutotuner.precompile", wait)
                exec(wrapper.kernel_autotune_defs.getvalue(), scope)
            tuners = [value for value in scope.values() if isinstance(value, CachingAutotuner)]
            # LLVM and the assembler release the interpreter lock.
            with one_parse_at_a_time(), ThreadPoolExecutor(os.cpu_count()) as pool:
                for compiled in [pool.submit(copy_context().run, precompile, tuner) for tuner in tuners]:
                    compiled.result()
        except kernel_configs.UnknownConfigError:
            raise
        except Exception as error:
            raise RuntimeError(self._why_not(error)) from error
        for tuner in tuners:
            launcher = tuner.launchers[0]
            values = {**(tuner.triton_meta.get("constants") or {}), **launcher.config.all_kwargs()}
            config = {name: _plain(value) for name, value in values.items() if value is not None}
            shared = launcher.bin.metadata.shared
            choice = KernelChoice(
                self.method, _kernel_name(tuner), len(listed.get(tuner, tuner.launchers)), config, shared
            )
            self.report.kernels.append(choice)
            tuner.save_gpu_kernel("stream0", launcher)

    def choose_gemm(self, choices: list[Any]) -> list[Any]:
        """A preprocessing function for Inductor: keeps only the best of several templates, so none is timed."""
        from torch._inductor import select_algorithm

        templates = [choice for choice in choices if isinstance(choice, select_algorithm.TritonTemplateCaller)]
        if not templates:
            return choices
        best = max(templates, key=lambda choice: score_gemm(choice, self.report.model))
        self.report.gemms.append(GemmChoice(self.method, _static_shape(best), len(templates), best.description))
        return [best]

    def _why_not(self, error: Exception) -> str:
        model = self.report.model
        kernel = _kernel_that_failed(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{f'kernel {kernel}' if kernel else 'a kernel'} of method {self.method} does not compile for {model.name} "
            f"({model.arch}, {model.max_shared} bytes of shared memory): {reason.rstrip('. ')}: "
            "choose another --target or scheme"
        )


@contextlib.contextmanager
def one_parse_at_a_time() -> Iterator[None]:
    """Context in which only one thread at a time parses Python. Triton parses each kernel and the functions it calls.

    CPython keeps one recursion counter for all threads while it makes syntax trees, and raises SystemError if two
    threads do so at once (python/cpython issue 106905).
    """
    lock, stock = threading.RLock(), ast.parse

    def parse(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return stock(*args, **kwargs)

    with replacing(CROSS) as replace:
        replace("ast:parse", parse)
        yield


def score_gemm(choice: Any, model: GpuModel) -> tuple[float, ...]:
    """Rank of a GEMM template without timing it: fits into shared memory, wastes few rows, takes least estimated time.

    The estimate is the number of waves of tiles, times the cost of a tile: its products plus the elements it loads.
    """
    info = choice.info_dict()
    try:
        block_m, block_k, block_n = (int(part) for part in str(info["tile_shape"]).strip("()").split(","))
        stages = int(info["num_stages"])
    except (KeyError, ValueError):
        return (-1.0,)
    *batch, columns = _static_shape(choice)
    rows = math.prod(batch)
    fits = stages * block_k * (block_m + block_n) * choice.layout.dtype.itemsize <= model.max_shared
    row_blocks = math.ceil(rows / block_m)
    waves = math.ceil(row_blocks * math.ceil(columns / block_n) / model.num_sms)
    return (
        float(fits and stages > 1),
        float(row_blocks * block_m <= 2 * rows or block_m == 16),
        -waves * (block_m * block_n + 64.0 * (block_m + block_n)),
        float(min(block_k, 64)),
        float(stages),
    )


def _static_shape(choice: Any) -> tuple[int, ...]:
    import sympy

    sizes = (sympy.sympify(size) for size in choice.layout.size)
    return tuple(int(size.subs(dict.fromkeys(size.free_symbols, UNKNOWN_SIZE))) for size in sizes)


def _plain(value: Any) -> Any:
    """A constexpr as a JSON value. Some kernels take types, which become text."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _kernel_name(tuner: Any) -> str:
    return str(tuner.fn.__name__)


def _kernel_that_failed(error: Exception) -> str:
    """Name of the kernel whose compilation failed, from the frames of the error; "" if it is unknown."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    frame, name = error.__traceback__, ""
    while frame is not None:
        compiling = frame.tb_frame.f_locals.get("self")
        name = _kernel_name(compiling) if isinstance(compiling, CachingAutotuner) else name
        frame = frame.tb_next
    return name
