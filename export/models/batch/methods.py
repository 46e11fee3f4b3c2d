"""The methods of an export for several sequences: `prefill` of a slot, `decode` of slot 0, `decode_batch` of all rows.

`decode_batch` has a fixed number of rows, so that it can be a CUDA graph; empty rows cost next to nothing on CUDA.

Letters: B slots and rows, T tokens of one call, C positions of a slot, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from executorch_moe.export.models import attention
from executorch_moe.export.models.causal_lm import EXAMPLE_TOKENS, CacheView, CausalLM, check_positions
from executorch_moe.export.models.decoder_layer import OneTokenDecoderLayer
from executorch_moe.export.models.delta_rule import LINEAR
from executorch_moe.export.models.linears import OneTokenLinears
from executorch_moe.export.models.sampling import FindNucleus, Sampler, greedy, nucleus, sample
from executorch_moe.kernels.batch.arguments import MAX_ROWS

from .cache import RowsView, SlotKVCache, SlotView
from .sampling import greedy_rows, nucleus_rows, sample_rows

NOT_TOGETHER = "export without --max-batch"


def check_batch(max_batch: int) -> None:
    """Check a number of sequences.

    Raises:
        ValueError: it is below 1 or over 64.
    """
    if not 1 <= max_batch <= MAX_ROWS:
        raise ValueError(f"max_batch={max_batch} must be from 1 (one sequence) to {MAX_ROWS}: choose a value there")


def check_kinds(kinds: tuple[str, ...] | list[str], *, for_cuda: bool) -> None:
    """Check that layers of these kinds can do several sequences.

    Raises:
        NotImplementedError: layers with a recurrent state on CUDA targets.
    """
    if LINEAR in kinds and for_cuda:
        raise NotImplementedError(
            f"several sequences at once need layers of attention only on CUDA: use --target cpu, or {NOT_TOGETHER}"
        )


class BatchedLM(CausalLM):
    """A causal language model with a cache of B slots.

    Attributes:
        output: what the methods return, "token", "greedy" or "logits".
        find_nucleus, find_nucleus_rows: see `sampling.sample` and `sample_rows`.
    """

    def __init__(self, model: nn.Module, max_context: int, slots: int, output: str) -> None:
        """Wraps a model as `CausalLM` does.

        Raises:
            ValueError, NotImplementedError: see `CausalLM`, `check_batch` and `check_kinds`; or a model for CUDA has
                layers that cannot do several sequences.
        """
        super().__init__(model, max_context)
        check_batch(slots)
        check_kinds(self.kinds, for_cuda=self._for_cuda)
        self.slots, self.output = slots, output
        self.kv_cache = SlotKVCache(self.kv_cache, slots, max_context)
        self.find_nucleus: FindNucleus = nucleus
        self.find_nucleus_rows: FindNucleus = nucleus_rows
        if self._for_cuda and not all(_takes_rows(layer) for layer in self.model.model.layers):
            raise NotImplementedError(
                "several sequences at once on CUDA need Qwen3-MoE's layers, in bf16, with linear layers that are int8 "
                f"or not quantized: use --dense int8, or {NOT_TOGETHER}"
            )

    @property
    def _for_cuda(self) -> bool:
        return bool(self.model.config._attn_implementation == attention.NAME)

    def prefill(self, input_ids: Tensor, cache_position: Tensor, slot: Tensor, *settings: Tensor) -> Tensor:
        """The next token of the text in a slot, or its logits.

        Args:
            input_ids: int64 [1, T]. cache_position: int64 [T]; see `CausalLM.forward`. slot: int64 [1].
            settings: temperature, top_p and seed, as for `SamplingLM`, with output "token".
        """
        check_positions(cache_position, self.max_context)
        logits = self._run(input_ids, cache_position[None], SlotView(self.kv_cache, cache_position, slot))
        return self._pick(logits, cache_position, settings)

    def decode(self, input_ids: Tensor, cache_position: Tensor, *settings: Tensor) -> Tensor:
        """`prefill` of one token in slot 0: the same as without other slots."""
        check_positions(cache_position, self.max_context)
        logits = self._run(input_ids, cache_position[None], SlotView(self.kv_cache, cache_position, None))
        return self._pick(logits, cache_position, settings)

    def decode_batch(self, input_ids: Tensor, positions: Tensor, slots: Tensor, *settings: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            input_ids: int64 [B, 1]. positions: int64 [B], of these tokens; below 0: an empty row.
            slots: int64 [B], the slot of each row, a different one for each that is not empty.
            settings: temperature and top_p, fp32 [B], and seed, int64 [B], with output "token".

        Returns:
            int64 [B, 1], or the logits, fp32 [B, V]. Those of empty rows mean nothing.
        """
        check_positions(positions.clamp(min=0), self.max_context)
        assert isinstance(self.kv_cache, SlotKVCache)
        at = positions.clamp(min=0)
        logits = self._run(input_ids, at[:, None], RowsView(self.kv_cache, positions, slots))
        if self.output == "token":
            temperature, top_p, seed = settings
            return sample_rows(logits, at + 1, temperature, top_p, seed, self.find_nucleus_rows)
        return logits if self.output == "logits" else greedy_rows(logits)

    def _pick(self, logits: Tensor, cache_position: Tensor, settings: tuple[Tensor, ...]) -> Tensor:
        if self.output == "token":
            temperature, top_p, seed = settings
            return sample(logits, cache_position[-1:] + 1, temperature, top_p, seed, self.find_nucleus)
        return logits if self.output == "logits" else greedy(logits)

    def _run(self, input_ids: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
        """Logits after the last token of each text, fp32 [N, V]; input_ids and positions int64 [N, T]."""
        masks = {kind: self._mask_at(kind, positions) for kind in self.kinds}
        output = self.model(
            input_ids=input_ids,
            attention_mask=masks if len(masks) > 1 or LINEAR in masks else masks[self.kinds[0]],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def _mask_at(self, kind: str, positions: Tensor) -> Tensor | None:
        """Mask for one kind of layer, as `CausalLM` makes it, for N texts: positions int64 [N, T]."""
        if kind == LINEAR:
            return None
        window = self.model.config.sliding_window if kind == "sliding_attention" else None
        own = positions[:, None, :, None]
        if self._for_cuda:
            return own if window is None else torch.cat([(own - window + 1).clamp(min=0), own], -1)
        assert isinstance(self.kv_cache, SlotKVCache)
        at = torch.arange(self.kv_cache.positions, device=positions.device)
        mask = at <= own
        if window is not None:
            mask = mask & (at > own - window)
        if self.model.config._attn_implementation == "eager":
            return torch.zeros_like(mask, dtype=self.kv_cache.dtype).masked_fill(~mask, -1e9)
        return mask


def _takes_rows(layer: nn.Module) -> bool:
    return isinstance(layer, OneTokenDecoderLayer) and layer.takes_rows


class _Method(nn.Module):
    """A method of a `BatchedLM` as a module that can be exported; names of weights and cache are the same in all."""

    def __init__(self, lm: BatchedLM, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.kv_cache = lm.model, lm.kv_cache
        self.method = method

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.method(*inputs)


def export_batched(lm: BatchedLM, *, one_token_linears: bool = False) -> dict[str, ExportedProgram]:
    """Exports the methods of `lm`; see `causal_lm.export_methods`."""
    device = lm.kv_cache.device
    length = Dim("T", min=1, max=lm.max_context)
    tokens = min(EXAMPLE_TOKENS, lm.max_context) - 1
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    settings = Sampler().inputs(device) if lm.output == "token" else ()

    def text(size: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, size, dtype=torch.int64, device=device), torch.arange(size, device=device)

    rows = torch.arange(lm.slots, device=device)
    batch = (
        torch.zeros_like(rows)[:, None],
        torch.zeros_like(rows),
        rows,
        *(s.expand(lm.slots).clone() for s in settings),
    )
    dynamic: Any = ({1: length}, {0: length}, None, *(None for _ in settings))
    programs = {}
    for name, method, example, shapes in (
        ("prefill", lm.prefill, (*text(tokens), zero, *settings), (dynamic,)),
        ("decode", lm.decode, (*text(1), *settings), None),
        ("decode_batch", lm.decode_batch, batch, None),
    ):
        with torch.no_grad(), OneTokenLinears() if one_token_linears else contextlib.nullcontext():
            programs[name] = torch.export.export(
                _Method(lm, method).eval(), example, dynamic_shapes=shapes, strict=False
            )
    return programs
