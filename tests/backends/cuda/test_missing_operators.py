"""Operators that ExecuTorch's CUDA runtime lacks: all are found before compiling, each with its module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F

from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.missing_operators import (
    MissingOperator,
    MissingOperatorsError,
    find_operators,
    missing_operators,
)


class Histogram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, 4)


class Distance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)


class Lacking(nn.Module):
    """Two modules that call one missing operator, a nested module that calls another, and the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Histogram(), Histogram()
        self.block = nn.Sequential(nn.Linear(4, 4), Distance())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.first(x), self.second(x), self.block(x), torch.nonzero(x)


class Whole(nn.Module):
    """Operators that are decomposed, lowered by Inductor, replaced by ExecuTorch, or in its runtime."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x[None, None]
        return (
            F.scaled_dot_product_attention(heads, heads, heads),
            x.topk(2).values,
            x.sort(stable=True).values,
            x.cumsum(0),
            torch.searchsorted(x[0], x),
            F.layer_norm(F.gelu(x), [4]),
        )


class LongRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2000).topk(2).values


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: torch.histc(x, 4), lambda x: x[0].clone(), (x,))


def found(module: nn.Module) -> list[MissingOperator]:
    return missing_operators(export(module, (torch.eye(4),)))


def test_every_one_is_listed_with_its_module() -> None:
    assert found(Lacking()) == [
        MissingOperator("aten._cdist_forward", "block.1", "Distance"),
        MissingOperator("aten.histc", "first", "Histogram"),
        MissingOperator("aten.histc", "second", "Histogram"),
        MissingOperator("aten.nonzero", "", "Lacking"),
    ]


def test_nothing_is_listed_that_can_be_compiled() -> None:
    assert found(Whole()) == []


def test_topk_of_long_rows_is_left_to_a_library() -> None:
    assert [missing.operator for missing in found(LongRows())] == ["aten.topk"]


# The expected results are those of exports for sm_90.
@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (lambda x: x.cumsum(-1), []),
        (lambda x: x.sort(-1)[0], []),
        (lambda x: x.topk(3)[0], []),
        (lambda x: x.index_put((torch.arange(8),), x, accumulate=True), []),
        (lambda x: x.scatter_add(0, torch.zeros(8, 64, dtype=torch.int64), x), []),
        (lambda x: torch.baddbmm(x[None], x[None, :, :8], x[None]), []),
        (lambda x: nn.functional.scaled_dot_product_attention(*[x[None, None].bfloat16()] * 3).float(), []),
        (lambda x: torch.histc(x, 8, 0, 8), ["aten.histc"]),
    ],
)
def test_operators_one_by_one(operator: Callable[[torch.Tensor], torch.Tensor], expected: list[str]) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return operator(x)

    program = export(Calls(), (torch.randn(8, 64),))
    assert [missing.operator for missing in missing_operators(program)] == expected


def test_branches_are_searched() -> None:
    assert found(Branches()) == [MissingOperator("aten.histc", "branch", "Branch")]


def test_kernel_names_of_the_compiler_are_found_again() -> None:
    program = export(Lacking(), (torch.eye(4),))
    names = ["aoti_torch_cuda_histc", "at::_ops::nonzero::call", "mine::unknown"]
    assert find_operators(program, names) == [
        MissingOperator("aten.histc", "first", "Histogram"),
        MissingOperator("aten.histc", "second", "Histogram"),
        MissingOperator("aten.nonzero", "", "Lacking"),
        MissingOperator("mine::unknown", ""),
    ]


def test_partitioner_refuses_with_all_of_them() -> None:
    with pytest.raises(MissingOperatorsError) as raised:
        MoECudaPartitioner().transform_for_pre_decomposition(export(Lacking(), (torch.eye(4),)))
    assert str(raised.value) == (
        "ExecuTorch's CUDA runtime has no kernel for aten._cdist_forward in block.1 (Distance); "
        "aten.histc in first (Histogram); aten.histc in second (Histogram); aten.nonzero in Lacking: "
        "rewrite these parts of the model in other operators"
    )
