"""Shows how well few tokens fill a GPU: registers and shared memory of each GEMM, and waves of its tiles.

    python examples/decode_waves.py [--gpu a100 --gpu rtx4090] [--shape qwen35]

It needs no GPU: it compiles the kernels for the named GPUs and counts the tiles of random routing. A wave is as many
programs as the GPU runs at a time. A persistent grid is one wave, whose programs compute `waves` tiles each.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.gpus import find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import compile_launch, record_launches
from executorch_moe.kernels.measure.timing import random_routing
from executorch_moe.kernels.shapes import SHAPES


def tiles_with_work(launch: Launch, ids: torch.Tensor) -> int:
    """Tiles of a GEMM for this routing: row blocks of all experts x blocks of weight rows x parts of K."""
    c = launch.constexprs
    if "BLOCK_M" not in c:  # the matrix-vector kernel: every program has work
        return int(launch.grid[0] * launch.grid[1])
    counts = ids.flatten().bincount()
    row_blocks = int((-(-counts // c["BLOCK_M"])).sum())
    return row_blocks * (c["N"] // c["BLOCK_N"]) * c.get("SPLIT_K", 1)


def main(
    gpu: Annotated[list[str], typer.Option(help="GPU by name, as for executorch-moe export --target.")] = [  # noqa: B006
        "a100",
        "rtx4090",
    ],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen35",
) -> None:
    """Prints one table in Markdown."""
    layer = SHAPES[shape]
    print(f"{shape}, W4A16, uniform routing, configurations of an export for the GPU\n")
    columns = (
        "GPU (SMs)",
        "tokens",
        "GEMM",
        "tile",
        "warps",
        "registers",
        "shared of limit",
        "resident",
        "tiles",
        "waves",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name in gpu:
        model = find_model(name)
        for tokens in (1, 2, 4, 8, 16, 32):
            ids, _ = random_routing(tokens, layer, "uniform", "cpu", torch.Generator().manual_seed(0))
            for launch in record_launches(model.gpu, "w4a16", tokens, layer, Options()):
                if "GEMM" not in launch.constexprs:
                    continue
                report = compile_launch(launch, model.capability)
                resident = report.programs_per_sm(model) * model.num_sms
                tiles = tiles_with_work(launch, ids)
                c = launch.constexprs
                tile = f"{c['BLOCK_N']} x {c['BLOCK_M']}" if "BLOCK_M" in c else f"{c['ROWS']} x {c['SLOTS']} experts"
                print(
                    f"| {name} ({model.num_sms}) | {tokens} | {c['GEMM']} | {tile} "
                    f"| {report.num_warps} | {report.registers} | {report.shared:,} of {model.max_shared:,} "
                    f"| {resident} | {tiles} | {tiles / resident:.2f} |"
                )


if __name__ == "__main__":
    typer.run(main)
