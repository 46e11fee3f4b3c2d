"""Host code that lets our kernels start before the launch before them has ended, from sm_90 on.

That is programmatic dependent launch. A kernel launched so waits for the launches before it by itself, as ours do
(`launches_before` in kernels/_device.py). AOTInductor's host code launches without it. Its text stays as it is; behind
it come a second way to launch and a macro that takes it for our kernels, wherever the code that follows launches one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from executorch_moe.backends.cuda.patches.registry import LAUNCHES, LOCK, USES, replacing

WAITING_KERNELS = (
    "moe_few_tokens_gemm",
    "moe_grouped_gemm",
    "moe_quantize_rows",
    "moe_route_count",
    "moe_route_scatter",
    "moe_one_token_attention",
    "moe_one_token_matvec",
    "moe_one_token_router",
    "moe_sum_pairs",
)
"""Kernels that wait for the launches before them. One that does not would read what is not written yet."""

LEAST_CAPABILITY = 90


class LaunchesDoNotOverlap(UserWarning):
    """An export is right, but slower than it could be: this torch's host code is not the known one."""


KERNEL_DRIVER = "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver"

# Of both ways to launch.
_PARAMETERS = """CUfunction func, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t numWarps,
                    uint32_t sharedMemBytes, void* args[], cudaStream_t stream"""

# Must be in the text of `kernel_driver`, up to spaces: the new way to launch is this one with an attribute.
_RELIED_ON = (
    "#define CUDA_DRIVER_CHECK(EXPR)",
    f"static inline void launchKernel({_PARAMETERS})"
    """{
    CUDA_DRIVER_CHECK(cuLaunchKernel(
        func, gridX, gridY, gridZ, 32*numWarps, 1, 1, sharedMemBytes, stream, args, nullptr
    ));
}""",
)

# Inductor numbers the functions that it is given: `kernels_.NAME_0` holds the function NAME. The macro decides by this
# name while the host code is compiled, so that a launch costs no look-up.
_ADDED = r"""
            static constexpr bool waitsForLaunchesBefore(std::string_view kernel) {
                kernel = kernel.substr(kernel.rfind('.') + 1);
                kernel = kernel.substr(0, kernel.find_last_not_of("0123456789") + 1);
                for (std::string_view name : {NAMES}) {
                    if (kernel == name) {
                        return true;
                    }
                }
                return false;
            }

            static inline void launchOverlapped(
                    PARAMETERS) {
                CUlaunchAttribute attribute{};
                attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                CUlaunchConfig config{};
                config.gridDimX = gridX;
                config.gridDimY = gridY;
                config.gridDimZ = gridZ;
                config.blockDimX = 32*numWarps;
                config.blockDimY = 1;
                config.blockDimZ = 1;
                config.sharedMemBytes = sharedMemBytes;
                config.hStream = stream;
                config.attrs = &attribute;
                config.numAttrs = 1;
                CUDA_DRIVER_CHECK(cuLaunchKernelEx(&config, func, args, nullptr));
            }

            #define launchKernel(kernel, ...) \
                (std::bool_constant<waitsForLaunchesBefore(#kernel)>::value ? launchOverlapped : launchKernel)( \
                    kernel, __VA_ARGS__)
        """.replace("NAMES", ", ".join(f'"{name}_"' for name in WAITING_KERNELS)).replace("PARAMETERS", _PARAMETERS)


def unknown_host_code() -> str:
    """Empty if this torch's host code launches kernels as this module expects, else what is not as expected."""
    with LOCK:
        return _unknown_host_code()


def why_not_overlapped(capability: int) -> str:
    """Empty if launches overlap in an export for this GPU, or its kind of GPU cannot; else a sentence for the user."""
    if capability < LEAST_CAPABILITY or not (why := unknown_host_code()):
        return ""
    return (
        f"launches of this export's kernels do not overlap, so that decoding takes longer ({why}): to change that, "
        f"{USES[LAUNCHES].remedy}"
    )


def _unknown_host_code() -> str:
    if torch.version.hip is not None:
        return "a ROCm build of torch"
    try:
        from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

        text = _without_spaces(CUDADeviceOpOverrides().kernel_driver())
    except (ImportError, AttributeError, TypeError) as error:
        return str(error)
    if text.count("launchKernel(") == 1 and all(_without_spaces(part) in text for part in _RELIED_ON):
        return ""
    return f"{CUDADeviceOpOverrides.__module__}: kernel_driver() has another launchKernel"


@contextlib.contextmanager
def overlapped_launches(capability: int) -> Iterator[None]:
    """Within it, AOTInductor's host code lets launches of our kernels overlap with the launch before.

    Nothing is changed for GPUs that cannot. Where this torch's host code is not the known one, nothing is changed
    either, and a `LaunchesDoNotOverlap` warning says so.

    Args:
        capability: of the GPU that is compiled for, 90 for sm_90.
    """
    if capability < LEAST_CAPABILITY:
        yield
        return
    with replacing(LAUNCHES) as replace:
        if why := why_not_overlapped(capability):
            warnings.warn(why, LaunchesDoNotOverlap, stacklevel=3)
        else:
            from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

            stock = CUDADeviceOpOverrides.kernel_driver

            def kernel_driver(self: Any) -> str:
                return str(stock(self)) + _ADDED

            replace(KERNEL_DRIVER, kernel_driver)
        yield


def _without_spaces(text: str) -> str:
    return "".join(text.split())
