"""Prints the times of docs/prefill.md: the operators for several tokens on this GPU, beside torch's attention.

python examples/prefill_operators.py [--tiles]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.prefill.arguments import CachedAttentionArguments, HeadsArguments
from executorch_moe.kernels.prefill.launches import (
    AttentionTile,
    run_cached_attention,
    run_residual_norm,
    run_rotated_heads,
    run_top_experts,
)
from executorch_moe.kernels.prefill.linear import run_prompt_linear

SIZES = [(32, 4, 128, tokens) for tokens in (512, 1642, 4096, 16384)]
SIZES += [(16, 2, 256, 1642), (16, 2, 256, 4096), (64, 8, 64, 1642)]
LINEARS = [(5120, 2048), (2048, 4096), (12352, 2048), (2048, 512)]
COPIES = 6
"""Matrices that linear layers take in turn, so that their weights are not in the L2 cache."""
TILES = [(128, 128, 2, 8), (128, 64, 2, 8), (128, 64, 3, 8), (128, 32, 4, 8), (64, 128, 2, 4), (64, 64, 3, 4)]


def microseconds(run: Callable[[], object]) -> float:
    """Median time of one call in a CUDA graph; its launches do not wait for the host."""
    run()
    return 1e3 * float(do_bench_cudagraph(run, rep=20, return_mode="median"))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def attention(heads: int, kv_heads: int, head_dim: int, tokens: int, tiles: bool) -> None:
    key, value = random(1, kv_heads, tokens, head_dim), random(1, kv_heads, tokens, head_dim)
    visible = torch.arange(tokens, device="cuda")[:, None]
    arguments = CachedAttentionArguments(random(1, tokens, heads, head_dim), key, value, visible, head_dim**-0.5)
    query = arguments.query.transpose(1, 2)
    flops = 2 * heads * head_dim * tokens * (tokens + 1)
    if tiles:
        for tile in TILES:
            us = microseconds(partial(run_cached_attention, arguments, tile=AttentionTile(*tile), submit=now))
            print(f"{tile}: {us:.1f} us")
        return

    def theirs(backend: SDPBackend) -> float:
        with sdpa_kernel(backend):
            return microseconds(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )
            )

    ours = microseconds(lambda: run_cached_attention(arguments, submit=now))
    flash, cudnn = theirs(SDPBackend.FLASH_ATTENTION), theirs(SDPBackend.CUDNN_ATTENTION)
    layer = f"| {heads}, {kv_heads}, {head_dim} | {tokens}"
    print(f"{layer} | {ours:,.1f} | {flops / ours / 1e6:.0f} | {flash:,.1f} | {cudnn:,.1f} |")


def others(tokens: int) -> None:
    row, norm, angles = random(1, tokens, 2048), random(128), random(1, tokens, 64)
    heads = HeadsArguments(random(1, tokens, 5120), norm, norm, angles, angles, 4, 1e-6)
    logits, weight = random(tokens, 128), random(2048)
    times = (
        microseconds(lambda: run_residual_norm(row, row, weight, 1e-6, submit=now)),
        microseconds(lambda: run_rotated_heads(heads, submit=now)),
        microseconds(lambda: run_top_experts(logits, 8, submit=now)),
    )
    print(f"| {tokens} | {' | '.join(f'{us:.1f}' for us in times)} |")


def linears(n: int, k: int, tokens: int) -> None:
    """int8 weights by `prompt_linear`; and cuBLAS with one matrix that is bf16 already, so without reading int8."""
    weights = torch.randint(-127, 128, (COPIES, n, k), dtype=torch.int8, device="cuda")
    x, scale, plain = random(tokens, k), torch.rand(n, device="cuda"), random(n, k)

    def all_copies(submit: Callable[[Launch], None]) -> float:
        return microseconds(lambda: [run_prompt_linear(x, w, scale, submit=submit) for w in weights]) / COPIES

    def conversion(launch: Launch) -> None:
        if "scale_ptr" not in launch.args:
            launch.run_now()

    times = all_copies(now), all_copies(conversion), microseconds(lambda: x @ plain.T)
    print(f"| {n} x {k} | {tokens} | {' | '.join(f'{us:.1f}' for us in times)} |")


def now(launch: Launch) -> None:
    launch.run_now()


def main(
    tiles: Annotated[bool, typer.Option("--tiles", help="Compare tiles of attention instead, heads of 128.")] = False,
) -> None:
    if not torch.cuda.is_available():
        typer.echo("error: no GPU is visible: run this on a machine with an NVIDIA GPU", err=True)
        raise typer.Exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    if not tiles:
        print("| heads, key/value heads, numbers | tokens | us | TFLOP/s | FlashAttention-2 of torch, us | cuDNN, us |")
        print("|---|---|---|---|---|---|")
    for heads, kv_heads, head_dim, tokens in SIZES:
        if not tiles or head_dim == 128:
            attention(heads, kv_heads, head_dim, tokens, tiles)
    if not tiles:
        print("\n| tokens | `residual_norm` | `rotated_heads` | `top_experts` |\n|---|---|---|---|")
        for tokens in (512, 1642, 4096):
            others(tokens)
        print("\n| linear layer | tokens | `prompt_linear`, us | of which to bf16, us | cuBLAS from bf16, us |")
        print("|---|---|---|---|---|")
        for n, k in LINEARS:
            for tokens in (128, 512, 1642, 4096):
                linears(n, k, tokens)


if __name__ == "__main__":
    typer.run(main)
