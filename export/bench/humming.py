"""Humming's grouped GEMMs (PyPI humming-kernels, Apache-2.0) as an implementation of an expert layer in `bench kernel`.

The package is optional. It compiles its kernels on the machine, with NVRTC or nvcc, in about a minute per shape.

Source: the sources of humming-kernels 0.1.19, and vLLM 0.33, which calls it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from executorch_moe.kernels.gpus import gpu_of
from executorch_moe.kernels.measure.padded_lists import PaddedLists, padded_lists, weighted_sum
from executorch_moe.kernels.measure.timing import LayerInputs
from executorch_moe.kernels.packing.experts import PackedExperts
from executorch_moe.kernels.packing.fragments import deinterleave_gate_up, fragment_order, unpack_int4, unpack_scales
from executorch_moe.kernels.packing.mxfp4 import E8M0_BIAS
from executorch_moe.kernels.schemes import SCHEMES

VERSION = "0.1.19"
ACTIVATIONS = {"w4a16": None, "w4a8": "int8", "mxfp4": None}
"""Scheme -> dtype of the activations in both GEMMs; None is bf16."""
SILU = {"activation_type": "binary_split", "activation_impl": "(a / (1.f + expf(-a))) * b"}
LOCKS_PER_SM = 64


def check_humming() -> None:
    """Checks that the package can be imported.

    Raises:
        ValueError: it cannot.
    """
    try:
        import humming.forward  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"implementation='humming' needs another package ({error}): pip install humming-kernels=={VERSION}"
        ) from None


def plain_codes(packed: PackedExperts, gemm: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of GEMM `gemm`, 1 or 2, of a packed layer, without our order of codes and our padding.

    value = (nibble - 8) * scale. Gate rows come first, then up rows. Scales of w4a8 are row scale times
    multiple, rounded to bf16. Nibbles of mxfp4 are e2m1.

    Returns:
        Codes uint8 [E, N, K/2], even k in the low nibble; scales bf16 [E, N, K/group_size], of mxfp4 uint8 (e8m0).
    """
    order = fragment_order(packed.scheme, gemm)
    w, scale = (packed.w13, packed.w13_scale) if gemm == 1 else (packed.w2, packed.w2_scale)
    assert scale is not None, "the layer has no 4-bit codes"
    h, i = packed.hidden_size, packed.intermediate_size
    k = h if gemm == 1 else i
    microscaled = SCHEMES[packed.scheme].microscaled

    def rows(t: Tensor) -> Tensor:  # [1, padded N, columns] -> [N, columns]
        if gemm == 2:
            return t[0, :h]
        halves = deinterleave_gate_up(t).unflatten(1, (2, -1))
        return halves[0, :, :i].flatten(0, 1)

    codes, scales = [], []
    for expert in range(packed.num_experts):  # one at a time: a layer in fp32 takes eight times the memory of its codes
        at = slice(expert, expert + 1)
        unpacked = rows(unpack_int4(w[at], order))[:, :k]
        nibbles = (unpacked if microscaled else unpacked + 8).to(torch.uint8).unflatten(1, (-1, 2))
        codes.append(nibbles[..., 0] | (nibbles[..., 1] << 4))
        own = rows(unpack_scales(scale[at], order))[:, : k // packed.group_size]
        scales.append((own.log2() + E8M0_BIAS).to(torch.uint8) if microscaled else own.bfloat16())
    return torch.stack(codes), torch.stack(scales)


class HummingGemm:
    """One grouped GEMM of all experts."""

    def __init__(self, codes: Tensor, scales: Tensor, act: str | None, pair_counts: Sequence[int]) -> None:
        """Converts the weights to Humming's layout, and chooses the kernels for these numbers of pairs.

        Args:
            codes, scales: of `plain_codes`. act: as in `ACTIVATIONS`.
        """
        from humming import dtypes
        from humming.schema import HummingInputSchema, HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors
        from humming.tune import get_heuristics_config

        experts, n, half = codes.shape
        group_size = 2 * half // scales.shape[2]
        schema = HummingWeightSchema(b_dtype=dtypes.uint4, weight_scale_group_size=group_size)
        if scales.dtype == torch.uint8:
            schema = HummingWeightSchema(
                b_dtype=dtypes.float4e2m1, bs_dtype=dtypes.float8e8m0, weight_scale_group_size=group_size
            )
            scales = scales.view(torch.float8_e8m0fnu)
        self.layer, self.tensors = prepare_and_transform_humming_tensors(
            {"weight": codes.view(torch.int32).clone(), "weight_scale": scales.clone()},
            n,
            2 * half,
            schema,
            None if act is None else HummingInputSchema(a_dtype=getattr(dtypes, act)),
            num_experts=experts,
            torch_dtype=torch.bfloat16,
            device=codes.device,
        )
        choice = {"use_f16_accum": False, "use_batch_invariant": False, "gemm_type": "indexed"}
        # (more pairs than, pairs up to, configuration). Only those that are needed are compiled.
        entries = get_heuristics_config(layer_config=self.layer, **choice)
        self.entries = [entry for entry in entries if any(entry[0] < pairs <= entry[1] for pairs in pair_counts)]
        self.compute, self.tuning = json.dumps(choice), json.dumps(self.entries)
        sms = gpu_of(codes.device.index).num_sms
        self.locks = torch.zeros(LOCKS_PER_SM * sms, dtype=torch.int32, device=codes.device)
        self.columns = n

    def block_m(self, pairs: int) -> int:
        """Rows of a block of the lists for this number of pairs."""
        return int(next(entry[2]["block_shape"][0] for entry in self.entries if entry[0] < pairs <= entry[1]))

    def __call__(self, x: Tensor, pairs: int, top_k: int, lists: PaddedLists, activation: dict[str, str]) -> Tensor:
        """Runs the GEMM.

        Args:
            x: bf16 [pairs / top_k, K], or twice as many columns with an activation.
            top_k: pairs of a row of `x`. activation: `SILU` to apply it to `x` first, or nothing.

        Returns:
            bf16 [pairs, N].
        """
        from humming.forward import humming_forward, may_process_input

        x, group_scale, token_scale = may_process_input(self.layer, inputs=x, **activation)
        mode = self.layer.input_quant_mode
        return humming_forward(  # type: ignore[no-any-return]
            self.layer,
            inputs=x,
            weight=self.tensors["weight"],
            weight_scale=self.tensors.get("weight_scale"),
            zero_point=self.tensors.get("zero_point"),
            weight_scale_2=self.tensors.get("weight_scale_2"),
            input_scale=group_scale if mode.has_group_scale else token_scale,
            input_scale_2=token_scale if mode.has_secondary_scale else None,
            outputs=torch.empty(pairs, self.columns, dtype=torch.bfloat16, device=x.device),
            locks=self.locks,
            compute_config=self.compute,
            tuning_config=self.tuning,
            top_k=top_k,
            sorted_ids=lists.pair_ids,
            expert_ids=lists.block_expert,
            num_tokens_padded=lists.num_rows,
            valid_shape_m=pairs,
        )


class HummingExperts:
    """A layer: our routing as padded lists, Humming's GEMMs and activation, our weighted sum."""

    def __init__(self, packed: PackedExperts, tokens: Sequence[int], top_k: int) -> None:
        """Takes the weights of a packed layer of a scheme in `ACTIVATIONS`.

        Args:
            tokens: numbers of tokens to be measured.
        """
        counts = [count * top_k for count in tokens]
        act = ACTIVATIONS[packed.scheme]
        self.gemm1, self.gemm2 = (HummingGemm(*plain_codes(packed, gemm), act, counts) for gemm in (1, 2))

    def __call__(self, layer: LayerInputs) -> Tensor:
        """The layer's result, bf16 [T, H]."""
        arguments: Any = layer.args()
        tokens, top_k = layer.topk_ids.shape
        pairs = tokens * top_k
        gpu = gpu_of(layer.hidden_states.device.index)
        lists = {
            height: padded_lists(arguments, height, gpu, gpu.capability)
            for height in dict.fromkeys(gemm.block_m(pairs) for gemm in (self.gemm1, self.gemm2))
        }
        hidden = self.gemm1(layer.hidden_states, pairs, top_k, lists[self.gemm1.block_m(pairs)], {})
        y = self.gemm2(hidden, pairs, 1, lists[self.gemm2.block_m(pairs)], SILU)
        return weighted_sum(y, layer.topk_weights, gpu.capability)
