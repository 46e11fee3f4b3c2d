"""Times the launches of `gated_delta_net` on a GPU, beside the time that their bytes take at the GPU's bandwidth.

Usage, in the root of the repository: python -m benchmarks.delta_rule [TOKENS ...]

The layer is that of Qwen3.5-35B-A3B: 16 key heads, 32 value heads, 128 numbers each, a convolution of 4, bf16. A CUDA
graph runs the operator of several layers with their own data, more than the level-2 cache holds, and the states are
updated in place as in an exported program. The time of a launch is that of all launches up to it less that of the
launches before it, so it starts with what these left in the cache. Medians of 25 replays.

Bytes of the operator: columns of `projected`, results and both states. Bytes of a launch: what it needs of each tensor
that it reads or writes, once for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from executorch_moe.kernels.delta_rule.arguments import DeltaRuleArguments, DeltaRuleSizes
from executorch_moe.kernels.delta_rule.launches import run_gated_delta_net
from executorch_moe.kernels.launch import Launch
from executorch_moe.kernels.measure.timing import time_graph

SIZES = DeltaRuleSizes(key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv_size=4)
WORKING_SET = 200 << 20
"""Bytes of all layers together, four times the level-2 cache of an H100."""


def random_layer(tokens: int, seed: int) -> DeltaRuleArguments:
    """Arguments for the next `tokens` tokens of a text."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator) * deviation

    heads = SIZES.value_heads
    return DeltaRuleArguments(
        random(tokens, SIZES.columns).bfloat16(),
        random(SIZES.channels, SIZES.conv_size, deviation=0.5).bfloat16(),
        random(heads),
        random(heads),
        (1.0 + random(SIZES.value_dim, deviation=0.1)).bfloat16(),
        random(SIZES.conv_size, SIZES.channels).bfloat16(),
        random(heads, SIZES.key_dim, SIZES.value_dim, deviation=0.1),
        torch.tensor([100], device="cuda"),
        SIZES.key_heads,
        SIZES.key_dim,
        1e-6,
    )


def launches_in_place(arguments: DeltaRuleArguments) -> list[Launch]:
    """The launches, with the states of the arguments also as the new states."""
    launches: list[Launch] = []
    run_gated_delta_net(arguments, submit=launches.append)
    states = {
        "conv_ptr": arguments.conv_state,
        "new_conv_ptr": arguments.conv_state,
        "state_ptr": arguments.recurrent_state,
        "new_state_ptr": arguments.recurrent_state,
    }
    return [
        replace(launch, args={name: states.get(name, value) for name, value in launch.args.items()})
        for launch in launches
    ]


def bytes_of(launch: Launch, tokens: int) -> int:
    """Bytes that a launch must read and write."""
    small = {"new_conv_ptr", "new_state_ptr", "position_ptr"}
    tensors = {name: t for name, t in launch.args.items() if isinstance(t, torch.Tensor) and name not in small}
    total = sum(t.nbytes for t in tensors.values())
    if "state_ptr" in tensors:
        total += tensors["state_ptr"].nbytes
    kind = launch.kernel.__name__
    row = 2 * tokens
    if kind == "moe_delta_rule_inputs":
        total -= row * SIZES.values  # z
    elif kind == "moe_delta_rule_chunk":
        total += tensors["v_ptr"].nbytes - tensors["qk_ptr"].nbytes // 2
    elif kind == "moe_delta_rule_output":
        total -= row * (SIZES.columns - SIZES.values)  # only z
    elif kind == "moe_delta_rule_state":
        total += tensors["u_ptr"].nbytes - tensors["projected_ptr"].nbytes - tensors["qk_ptr"].nbytes // 2
    return total


def table(tokens: int, bandwidth: float, change: Callable[[Launch], Launch] = lambda launch: launch) -> list[str]:
    """Rows of the table for a number of tokens; `change` may replace launches, to compare variants."""
    one = [change(launch) for launch in launches_in_place(random_layer(tokens, 0))]
    size = sum(
        {t.data_ptr(): t.nbytes for launch in one for t in launch.args.values() if hasattr(t, "nbytes")}.values()
    )
    layers = [one] + [
        [change(launch) for launch in launches_in_place(random_layer(tokens, seed))]
        for seed in range(1, max(3, min(48, WORKING_SET // size)))
    ]
    rows, before = [], 0.0
    for count in range(1, len(one) + 1):
        steps = [launch.run_now for layer in layers for launch in layer[:count]]
        time = time_graph(steps) * count
        nbytes = bytes_of(one[count - 1], tokens)
        rows.append((one[count - 1].kernel.__name__.removeprefix("moe_delta_rule_"), time - before, nbytes))
        before = time
    state = one[-1 if tokens == 1 else 2].args["state_ptr"]
    needed = 2 * tokens * (SIZES.columns + SIZES.values) + 2 * state.nbytes
    if len(rows) > 1:
        rows.append(("all", before, needed))
    return [
        f"| {tokens} | {name} | {us:.1f} | {nbytes / 1e6:.1f} | {1e6 * nbytes / bandwidth:.1f} "
        f"| {us * bandwidth / nbytes / 1e6:.1f} |"
        for name, us, nbytes in rows
    ]


def bandwidth_of_a_copy() -> float:
    """Bytes/s, read plus written, of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / time_graph([lambda: target.copy_(source)] * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the launches of gated_delta_net.")
    parser.add_argument("tokens", nargs="*", type=int, default=[1, 512, 1642, 4096])
    chosen = parser.parse_args()
    bandwidth = bandwidth_of_a_copy()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"copy {bandwidth / 1e12:.2f} TB/s\n"
    )
    print("| tokens | launch | us | MB | us for the bytes | ratio |\n|---|---|---|---|---|---|")
    for tokens in chosen.tokens:
        print("\n".join(table(tokens, bandwidth)), flush=True)


if __name__ == "__main__":
    main()
