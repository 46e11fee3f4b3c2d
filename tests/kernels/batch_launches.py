"""All launches of the operators for rows, to compile them."""

from __future__ import annotations

import torch

from executorch_moe.kernels.batch.arguments import RowsAttentionArguments
from executorch_moe.kernels.batch.launches import run_rows_attention, run_rows_linear, run_rows_router
from executorch_moe.kernels.gpus import Gpu
from executorch_moe.kernels.launch import Launch


def launches_of_rows(gpu: Gpu, rows: int, head_dim: int, dtype: torch.dtype) -> list[Launch]:
    """All launches of the operators, on meta tensors of Qwen3-30B-A3B's sizes, but for the head."""
    launches: list[Launch] = []
    with torch.device("meta"):
        bf16 = {"dtype": torch.bfloat16}
        x, cache = torch.empty(1, rows, 2048, **bf16), torch.empty(rows, 4, 2049, head_dim, **bf16)
        qkv, scale = torch.empty(40 * head_dim, 2048, dtype=dtype), torch.empty(40 * head_dim)
        norm, angles = torch.empty(head_dim, **bf16), torch.empty(1, rows, head_dim // 2, **bf16)
        at = torch.empty(rows, dtype=torch.int64)
        arguments = RowsAttentionArguments(
            x, qkv, scale, norm, norm, angles, angles, at, at, cache, cache, 0.1, 1e-6
        )  # fmt: skip
        run_rows_attention(arguments, gpu=gpu, submit=launches.append)
        head = torch.empty(50_000, 2048, dtype=dtype)
        run_rows_linear(x, head, torch.empty(50_000), gpu=gpu, submit=launches.append)
        run_rows_linear(x, torch.empty(2048, 2048, dtype=dtype), None, gpu=gpu, submit=launches.append)
        run_rows_router(x, torch.empty(128, 2048, **bf16), at, 8, gpu=gpu, submit=launches.append)
    return launches
