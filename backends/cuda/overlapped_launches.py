"""Programmatic dependent launch: from sm_90 on, our kernels start before the launch before them has ended.

A kernel that is launched this way must itself wait for the launches before it. Ours do (`launches_before` in
kernels/_device.py). The host code of AOTInductor launches kernels without this attribute. Its text is not changed; we
append a second launch function, and a macro that calls it for our kernels in all the code that follows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from executorch_moe.backends.cuda.patches.registry import LAUNCHES, LOCK, USES, replacing

WAITING_KERNELS = (
    "moe_cached_attention",
    "moe_delta_rule_chunk",
    "moe_delta_rule_inputs",
    "moe_delta_rule_one_token",
    "moe_delta_rule_output",
    "moe_delta_rule_rows",
    "moe_delta_rule_state",
    "moe_few_tokens_gemm",
    "moe_grouped_gemm",
    "moe_matvec",
    "moe_quantize_rows",
    "moe_route_count",
    "moe_route_scatter",
    "moe_one_token_attention",
    "moe_one_token_logits",
    "moe_one_token_matvec",
    "moe_one_token_router",
    "moe_one_token_shared_router",
    "moe_prompt_linear",
    "moe_residual_norm",
    "moe_rotated_heads",
    "moe_rows_attention",
    "moe_rows_linear",
    "moe_rows_router",
    "moe_sum_pairs",
    "moe_top_experts",
    "moe_weights_to_bf16",
)
"""Kernels that wait for the launches before them. Another kernel would read data that is not written yet."""

LEAST_CAPABILITY = 90


class LaunchesDoNotOverlap(UserWarning):
    """An export is correct but slower than possible, because the host code of this torch is not the known one."""


KERNEL_DRIVER = "torch._inductor.codegen.cuda.device_op_overrides:CUDADeviceOpOverrides.kernel_driver"

# Parameters of both launch functions.
_PARAMETERS = """CUfunction func, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t numWarps,
                    uint32_t sharedMemBytes, void* args[], cudaStream_t stream"""

# The text of `kernel_driver` must contain these, up to spaces. Our launch function is this one plus an attribute.
_RELIED_ON = (
    "#define CUDA_DRIVER_CHECK(EXPR)",
    f"static inline void launchKernel({_PARAMETERS})"
    """{
    CUDA_DRIVER_CHECK(cuLaunchKernel(
        func, gridX, gridY, gridZ, 32*numWarps, 1, 1, sharedMemBytes, stream, args, nullptr
    ));
}""",
)

# Inductor numbers the kernels: `kernels_.NAME_0` is the kernel NAME. The macro chooses by this name at compile time, so
# a launch costs no lookup.
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
    """Empty if the host code of this torch launches kernels as this module expects, else the difference."""
    with LOCK:
        return _unknown_host_code()


def why_not_overlapped(capability: int) -> str:
    """Empty if launches overlap in an export for this GPU or cannot on such GPUs; else the reason, one sentence.

    Args:
        capability: of the GPU, 90 for sm_90.
    """
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
    """Context in which AOTInductor's host code lets launches of our kernels overlap with the launch before.

    Changes nothing for GPUs without this feature. If the host code of this torch is not the known one, it changes
    nothing either and gives a `LaunchesDoNotOverlap` warning.

    Args:
        capability: of the target GPU, 90 for sm_90.
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
