"""Which family gets which fused part for CUDA targets: the table of docs/support.md, and the same results."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from executorch_moe.export.build import attention_of, streamline
from executorch_moe.export.checkpoint.structure import structure_of
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.options import Target
from executorch_moe.export.quantize.experts import quantize_experts_

from ..families import FAMILIES, FURTHER, RECURRENT, Family, Logits, by_name, tokens

PAGE = Path(__file__).parents[3] / "docs" / "support.md"
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    # a softmax over the chosen experts
    "qwen3_moe": {"norm_topk_prob": True},
    # norms of queries and keys, as the larger model has them
    "glm4_moe": {"use_qk_norm": True, "head_dim": 64},
    "mixtral": {"head_dim": 32},
}
"""Options of published models that the tiny ones lack."""
CONTEXT, PROMPT = 24, 13


class Operators(TorchDispatchMode):
    """Collects the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "executorch_moe":
            self.names.add(name.partition(".")[0])
        return func(*args, **(kwargs or {}))


def as_published(name: str) -> Family:
    family = by_name(name)
    return dataclasses.replace(family, options={**family.options, **AS_PUBLISHED.get(name, {})})


def tiny_model(name: str) -> nn.Module:
    """A model in fp32 whose experts add little, so that a change of their choice in bf16 changes little.

    transformers makes the router of some families of zeros: then all experts are equal, and a CPU chooses others than a
    GPU. These routers get random weights.
    """
    model = as_published(name).model()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gate.weight") and not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
        if ".experts." in parameter_name and "down" in parameter_name:
            parameter.data.div_(16)
    return model


@functools.cache
def logits_and_operators(name: str, device: str = "cpu") -> tuple[Tensor, Tensor, frozenset[str]]:
    """Logits of a prompt's last tokens, unmodified in fp32 and as for CUDA in bf16, and the operators of the latter."""
    reference = tiny_model(name)
    model: Any = tiny_model(name).to(torch.bfloat16)
    model.set_attn_implementation(attention_of(Target("sm_90"), structure_of(model)))
    module = CausalLM(streamline(quantize_experts_(model, "bf16")), CONTEXT).to(device)
    ids, positions, actual = tokens(PROMPT + 3), torch.arange(PROMPT + 3), []
    with Operators() as operators, torch.no_grad():
        for start, end in ((0, PROMPT), *((token, token + 1) for token in range(PROMPT, PROMPT + 3))):
            actual.append(module(ids[:, start:end].to(device), positions[start:end].to(device))[0].cpu())
        expected = Logits(reference)(ids)[0, PROMPT - 1 :]
    return expected, torch.stack(actual), frozenset(operators.names)


def table() -> dict[str, dict[tuple[str, ...], bool]]:
    """The table of fused parts: model type -> operators in the header of a column -> whether it has the part."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index("| model type |") :].partition("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [tuple(re.findall(r"`(\w+)`", cell)) for cell in header[1:]]
    return {
        kind: dict(zip(columns, (cell == "yes" for cell in cells), strict=True))
        for names, *cells in rows
        for kind in re.findall(r"`(\w+)`", names)
    }


ALL = (*FAMILIES, *FURTHER, *RECURRENT)


@pytest.mark.parametrize("family", ALL, ids=str)
def test_the_table_has_the_parts_of_each_family(family: Family) -> None:
    _, _, operators = logits_and_operators(family.name)
    found = {names: bool(operators.intersection(names)) for names in table()[family.name]}
    assert found == table()[family.name]


def test_the_table_has_every_family() -> None:
    assert set(table()) == {family.name for family in ALL}


@pytest.mark.parametrize("family", ALL, ids=str)
def test_fused_parts_compute_the_same(family: Family) -> None:
    check_results(family.name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ALL, ids=str)
def test_fused_parts_compute_the_same_on_a_gpu(family: Family) -> None:
    """The kernels of the operators, which need no export in plain PyTorch."""
    check_results(family.name, "cuda")


def check_results(name: str, device: str) -> None:
    """Asserts that logits in bf16 are about as near to the unmodified model in fp32 as that is in bf16.

    Wrong parts differ by 0.1 and more.
    """
    expected, actual, _ = logits_and_operators(name, device)
    with torch.no_grad():
        usual = Logits(tiny_model(name).to(torch.bfloat16))(tokens(PROMPT + 3))[0, PROMPT - 1 :].float()
    assert error(actual, expected) < 3 * error(usual, expected) + 0.01


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
