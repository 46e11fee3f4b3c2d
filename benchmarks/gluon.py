"""Times the GEMMs of an expert layer with the Gluon kernel beside the Triton kernel, on an NVIDIA H100 or H200.

    python -m benchmarks.gluon                 # checks, then times
    python -m benchmarks.gluon --check-only

Each configuration is checked in a process of its own, with a time limit: against fp32, bit by bit against the Triton
kernel, and run after run. Those that fail are not timed. Times are microseconds of a launch in a CUDA graph over layers
with different weights and routing, so that weights are not in L2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from executorch_moe.kernels.experts.plan import Options
from executorch_moe.kernels.gpus import find_model
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.compile import record_launches
from executorch_moe.kernels.measure.timing import LayerInputs, floor_us, make_layers, time_graph
from executorch_moe.kernels.shapes import SHAPES, LayerShape
from executorch_moe.kernels.tuning.configs import GemmConfig, GluonConfig

CONFIGS = {
    "16 256": GluonConfig(16, 256, 8, 8),
    "16 128 x2": GluonConfig(16, 128, 4, 8, ctas_per_sm=2),
    "16 128 x3": GluonConfig(16, 128, 4, 5, 4, ctas_per_sm=3),
    "32 256": GluonConfig(32, 256, 8, 8),
    "32 256 q": GluonConfig(32, 256, 8, 8, 4),
    "32 128 x2": GluonConfig(32, 128, 4, 6, ctas_per_sm=2),
    "32 128 x3 q": GluonConfig(32, 128, 4, 4, 4, ctas_per_sm=3),
    "64 256": GluonConfig(64, 256, 8, 6),
    "64 256 fence": GluonConfig(64, 256, 8, 6, fence=True),
    "64 256 q": GluonConfig(64, 256, 8, 6, 4),
    "64 128 x2": GluonConfig(64, 128, 4, 4, ctas_per_sm=2),
    "64 128 x2 q": GluonConfig(64, 128, 4, 4, 4, ctas_per_sm=2),
    "64 128 w8": GluonConfig(64, 128, 8, 8),
    "128 256": GluonConfig(128, 256, 8, 4),
    "128 256 q": GluonConfig(128, 256, 8, 4, 4),
    "128 128 x2 q": GluonConfig(128, 128, 4, 2, 4, ctas_per_sm=2),
    "128 128 w8": GluonConfig(128, 128, 8, 5),
    "256 128 w8": GluonConfig(256, 128, 8, 3, 4),
}
"""Name -> configuration: block_m, block_n, programs of a multiprocessor, q: quarters of a K block."""

TIMED = {
    "qwen35": {64: (16, 32), 128: (16, 32), 512: (16, 32, 64), 1642: (64, 128), 2048: (64, 128), 8192: (64, 128, 256)},
    "mixtral": {512: (64, 128, 256), 2048: (128, 256)},
}
"""Shape -> tokens -> heights of the tiles to time."""

SMALL = (
    (LayerShape(8, 2, 256, 128, 128), 37),
    (LayerShape(5, 3, 512, 256, 32), 129),
    (LayerShape(12, 2, 192, 320, 64), 400),
    (LayerShape(64, 8, 1024, 512, 128), 700),
)
"""Layers and tokens of the checks."""


def options_of(name: str) -> Options:
    return Options(path="gluon", gluon=(CONFIGS[name], CONFIGS[name]))


def check(name: str) -> str:
    """Checks one configuration; raises if its results are wrong."""
    config, notes = CONFIGS[name], []
    tile = GemmConfig(min(128, config.block_m), 128, 1, 4, 3)
    for shape, tokens in SMALL:
        for routing in ("uniform", "hot"):
            layer = make_layers(shape, "w4a16", tokens, 1, routing)[0]
            out = layer.run(options_of(name))
            torch.cuda.synchronize()
            layer.answer.check(out, name)
            again = sum(int((layer.run(options_of(name)) != out).any()) for _ in range(30))
            if again:
                raise RuntimeError(f"{shape} {routing}: {again} of 30 more runs gave other bits")
            if shape.group_size == 128:  # with other groups the kernels are the same, and compiling them takes time
                same = layer.run(Options(path="grouped", gemm1=tile, gemm2=tile))
                if different := int((out != same).sum()):
                    notes.append(f"{different} of {out.numel()} differ from Triton's, {shape} {routing}")
    return "; ".join(notes) or "same bits as Triton's kernel"


def gemms(launches: list[Launch]) -> dict[int, list[Launch]]:
    """The launches of each GEMM."""
    return {g: [launch for launch in launches if launch.constexprs.get("GEMM") == g] for g in (1, 2)}


def times(layers: list[LayerInputs], options: Options) -> tuple[float, float, float]:
    """Microseconds of GEMM1, of GEMM2 and of the whole layer."""
    recorded = []
    for layer in layers:
        launches: list[Launch] = []
        layer.answer.check(layer.run(options), "a kernel that is timed")
        layer.run(options, launches.append)
        for launch in launches:  # routing writes the lists that the GEMMs read
            launch.run_now()
        recorded.append(gemms(launches))

    def run_gemm(g: int, recorded: dict[int, list[Launch]]) -> None:
        for launch in recorded[g]:
            launch.run_now()

    one, two = (time_graph([partial(run_gemm, g, r) for r in recorded]) for g in (1, 2))
    return one, two, time_graph([partial(layer.run, options) for layer in layers])


def time_shape(name: str, usable: list[str], only: list[int]) -> None:
    """Prints a row for each configuration of each number of tokens."""
    shape = SHAPES[name]
    count = 2 if name == "mixtral" else 3
    for tokens, heights in TIMED[name].items():
        if only and tokens not in only:
            continue
        layers = make_layers(shape, "w4a16", tokens, count)
        rows = {"triton": Options(path="grouped")}
        rows |= {c: options_of(c) for c in usable if CONFIGS[c].block_m in heights}
        for row, options in rows.items():
            try:
                one, two, whole = times(layers, options)
            except Exception as error:
                print(f"| {name} | {tokens} | {row} | {type(error).__name__}: {str(error)[:100]} |", flush=True)
                if "CUDA" in str(error):
                    raise
                continue
            print(f"| {name} | {tokens} | {row} | {one:.1f} | {two:.1f} | {one + two:.1f} | {whole:.1f} |", flush=True)
        print(f"| {name} | {tokens} | floor | | | | {floor_us(shape, 'w4a16', layers):.1f} |", flush=True)
        del layers
        torch.cuda.empty_cache()


def fill_cache(work: tuple[str, str]) -> str:
    """Compiles both GEMMs of a configuration for a shape."""
    shape, name = work
    gpu = find_model("h200").gpu
    try:
        for launch in record_launches(gpu, "w4a16", 512, SHAPES[shape], options_of(name)):
            launch.kernel.warmup(**launch.args, **launch.constexprs, **launch.options, grid=launch.grid)
    except Exception as error:
        return f"{shape} {name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def run_alone(*arguments: str, limit: float) -> tuple[int, str]:
    """Runs this module in a process of its own. Exit status, -1 after the limit, and the output."""
    command = [sys.executable, "-m", "benchmarks.gluon", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        return -1, (output.decode() if isinstance(output, bytes) else output) + f"no end within {limit:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--time")
    parser.add_argument("--usable", default="[]")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--seconds", type=float, default=190)
    args = parser.parse_args()
    if args.check:
        print(check(args.check))
        return
    if args.time:
        time_shape(args.time, json.loads(args.usable), [int(t) for t in args.tokens.split(",") if t])
        return
    start = time.time()
    workers = max(2, (os.cpu_count() or 4) - 1)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    compiled = pool.map(
        fill_cache, [(s, c) for s in TIMED for c in CONFIGS if s == "qwen35" or CONFIGS[c].block_m > 32]
    )
    with ThreadPoolExecutor(8) as threads:
        results = dict(zip(CONFIGS, threads.map(lambda c: run_alone("--check", c, limit=60), CONFIGS), strict=True))
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    usable = [c for c, (status, _) in results.items() if status == 0]
    for c, (status, output) in results.items():
        print(f"check {c}: {'ok' if status == 0 else f'FAILED ({status})'}: {output.strip()[-600:]}")
    print(f"checked after {time.time() - start:.0f} s", flush=True)
    print("\n".join(filter(None, compiled)))
    print(f"compiled after {time.time() - start:.0f} s", flush=True)
    if args.check_only:
        return
    print("| shape | tokens | kernel | GEMM1 | GEMM2 | both | layer |\n|---|---|---|---|---|---|---|", flush=True)
    for shape in TIMED:
        left = args.seconds - (time.time() - start)
        if left > 10:
            share = left * 0.7 if shape == "qwen35" else left
            print(run_alone("--time", shape, "--usable", json.dumps(usable), limit=share)[1], flush=True)
    print(f"done after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
