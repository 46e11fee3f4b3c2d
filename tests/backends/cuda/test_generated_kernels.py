"""The check of generated kernels for accesses outside their buffers: on written sources, and on Inductor's kernels."""

from __future__ import annotations

import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import sympy
import torch
import torch._inductor.config as inductor_config
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
from executorch.exir import to_edge_transform_and_lower
from requirements import needs_cross_export
from torch import nn
from torch._inductor.codecache import AotCodeCompiler
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import Mod
from torch.utils._sympy.symbol import SymT, make_symbol

from executorch_moe.backends import lower as targets
from executorch_moe.backends.cuda import MoECudaPartitioner
from executorch_moe.backends.cuda.cross.target import target_cuda
from executorch_moe.backends.cuda.generated_kernels import AccessReport, OutOfBoundsError, checked_kernels
from executorch_moe.backends.cuda.generated_kernels.accesses import Kernel
from executorch_moe.backends.cuda.generated_kernels.check import MOST_POINTS, NOT_CHECKED, can_occur, check_kernel
from executorch_moe.backends.cuda.torch_defects import SETTINGS, defects_avoided

HEAD = """
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    xmask = xindex < xnumel
    x0 = xindex
"""


def checked(body: str, sizes: dict[str, int], numel: int, **arguments: int) -> AccessReport:
    """Run the check on a pointwise kernel with these statements after its head."""
    names = ", ".join([*sizes, *arguments])
    source = f"@triton.jit\ndef kernel({names}, xnumel, XBLOCK : tl.constexpr):{HEAD}" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    report = AccessReport()
    kernel = Kernel(source, set(sizes), {"xnumel": numel, **arguments}, {"x": numel})
    check_kernel(report, "kernel", kernel, sizes)
    return report


def test_what_stays_inside_is_proven() -> None:
    report = checked(
        """
        x1 = (xindex % 16)
        x2 = xindex // 16
        tmp0 = tl.load(in_ptr0 + (x1 + 16*x2), xmask, other=0.0).to(tl.float32)
        tmp1 = tl.load(in_ptr1 + (15 + ((-1)*x1)), None, eviction_policy='evict_last')
        tl.store(out_ptr0 + (x0), tmp0 + tmp1, xmask)
        """,
        {"in_ptr0": 64, "in_ptr1": 16, "out_ptr0": 64},
        64,
    )
    assert (report.proven, report.undecided, report.outside) == (3, [], [])


@pytest.mark.parametrize(
    ("index", "size", "first"),
    [("x0", 16, 16), ("2*x0", 32, 32), ("(x0 % 16) + 1", 16, 16), ("x0 - 1", 32, -1), ("x0 // 2 + ks0", 20, 20)],
)
def test_what_goes_outside_is_named(index: str, size: int, first: int) -> None:
    report = checked(f"tmp0 = tl.load(in_ptr0 + ({index}), xmask)", {"in_ptr0": size}, 32, ks0=5)
    (finding,) = report.outside
    assert (finding.buffer, finding.size, finding.index) == ("in_ptr0", size, first)
    with pytest.raises(OutOfBoundsError, match=rf"kernel touches element {first} of in_ptr0, which has {size}"):
        report.raise_if_outside()


def test_masks_decide_what_is_loaded() -> None:
    """As in `cat`: a mask selects where each part is loaded; the index is invalid elsewhere."""
    body = """
        tmp0 = x0
        tmp1 = tl.full([1], 16, tl.int64)
        tmp2 = tmp0 < tmp1
        tmp3 = tl.load(in_ptr0 + (x0), tmp2 & xmask, other=0.0)
        tmp4 = tmp0 >= tmp1
        tmp5 = tl.load(in_ptr1 + ((-{back}) + x0), tmp4 & xmask, other=0.0)
    """
    sizes = {"in_ptr0": 16, "in_ptr1": 16}
    assert checked(body.format(back=16), sizes, 32).proven == 2
    (finding,) = checked(body.format(back=15), sizes, 32).outside
    assert (finding.buffer, finding.index) == ("in_ptr1", 16)


def test_a_device_assertion_bounds_an_index_that_was_loaded() -> None:
    body = """
        tmp0 = tl.load(in_ptr0 + (x0), xmask)
        tl.device_assert(((0 <= tmp0) & (tmp0 < {rows})) | ~(xmask), "index out of bounds")
        tmp1 = tl.load(in_ptr1 + (tmp0), xmask)
        tmp2 = tl.load(in_ptr1 + (tmp1), xmask)
    """
    sizes = {"in_ptr0": 8, "in_ptr1": 10}
    report = checked(body.format(rows=10), sizes, 8)
    assert (report.proven, report.outside) == (2, [])
    assert report.undecided == ["kernel: tl.load(in_ptr1 + tmp1, xmask)"]  # this index is unknown
    assert len(checked(body.format(rows=11), sizes, 8).undecided) == 2


def test_a_kernel_too_large_to_go_through_is_sampled() -> None:
    numel = 4 * MOST_POINTS
    body = """
        tmp0 = x0 < 7
        tmp1 = tl.load(in_ptr0 + (x0), tmp0 & xmask)
        tmp2 = tl.load(in_ptr1 + (x0), xmask)
    """
    report = checked(body, {"in_ptr0": 7, "in_ptr1": numel}, numel)
    assert (report.proven, report.outside) == (1, [])
    assert report.undecided == ["kernel: tl.load(in_ptr0 + x0, tmp0 & xmask)"]
    assert checked(body, {"in_ptr0": 7, "in_ptr1": numel - 1}, numel).outside[0].index == numel - 1


@pytest.mark.parametrize("index", ["x0 & 7", "~x0", "x0 | 1", "x0 ^ 1"])
def test_bits_of_numbers_are_not_taken_for_masks(index: str) -> None:
    report = checked(f"tmp0 = tl.load(in_ptr0 + ({index}), xmask)", {"in_ptr0": 2}, 16)
    assert (report.proven, len(report.undecided), report.outside) == (0, 1, [])


def test_loads_inside_of_other_expressions_are_seen() -> None:
    body = "tmp0 = tl.load(in_ptr0 + (x0), xmask, other=tl.load(in_ptr1 + (x0)))"
    assert checked(body, {"in_ptr0": 16, "in_ptr1": 15}, 16).outside[0].buffer == "in_ptr1"


def test_loops_and_templates_are_read() -> None:
    source = textwrap.dedent(
        """
        def kernel(arg_A, out_ptr0, ks0):
            M = ks0
            K = 8
            BLOCK_M : tl.constexpr = 16
            A = arg_A
            if M * K == 0:
                return
            rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
            if M > 3:
                offs_a_m = rm % M
            else:
                offs_a_m = rm % M
            total = 0
            for k in range(0, 2):
                a_k_idx_vals = tl.arange(0, 4)[None, :] + k * 4
                idx_m = offs_a_m[:, None]
                xindex = a_k_idx_vals + {stride}*idx_m
                a = tl.load(A + (xindex))
                total = total + 1
            b = tl.load(A + total)
            idx_m = rm[:, None]
            mask = idx_m < M
            tl.store(out_ptr0 + (tl.broadcast_to(idx_m, [BLOCK_M, 1])), a, mask)
        """
    )

    def run(stride: int) -> AccessReport:
        report = AccessReport()
        kernel = Kernel(source.format(stride=stride), {"arg_A", "out_ptr0"}, {"ks0": 5})
        check_kernel(report, "template", kernel, {"arg_A": 40, "out_ptr0": 5})
        return report

    report = run(8)
    assert (report.proven, report.outside) == (2, [])
    assert report.undecided == ["template: tl.load(A + total)"]  # a value that changes between iterations
    assert "template: tl.load(A + xindex)" in run(9).undecided


class Repeated(nn.Module):
    """Repeats a buffer and applies a function to it, like rotary embeddings for one token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):  # enough operations for Inductor to store the result before repeating it
            x = (x * 1.1).sin()
        return torch.cat((x, x), -1).cos()


class Generated(BaseException):  # Inductor wraps an Exception
    """Ends a compilation when all kernels are generated, before the C++ compiler, which takes most of the time."""


def compile_repeated(partitioner: type) -> AccessReport:
    program = torch.export.export(Repeated(), (torch.randn(16),))
    specs = [CudaBackend.generate_method_name_compile_spec("forward")]
    with (
        torch.no_grad(),
        target_cuda("sm_90"),
        checked_kernels() as report,
        mock.patch.object(AotCodeCompiler, "compile", side_effect=Generated),
        pytest.raises(Generated),
    ):
        to_edge_transform_and_lower(program, partitioner=[partitioner(specs)])
    return report


@needs_cross_export
@inductor_config.patch(loop_index_inversion_in_fusion=True)  # torch's default
def test_inductors_defect_is_found_and_avoided() -> None:
    with pytest.raises(OutOfBoundsError, match=r"touches element 16 of in_ptr0, which has 16"):
        compile_repeated(CudaPartitioner)
    with defects_avoided():
        report = compile_repeated(CudaPartitioner)
        assert report.kernels >= 2 and not report.outside and not report.undecided
        inside = f"{report.proven} loads and stores of {report.kernels} generated kernels inside their buffers"
        assert str(report) == inside
    # Our partitioner disables the setting itself.
    assert not compile_repeated(MoECudaPartitioner).outside


def test_sizes_that_a_program_rules_out_refuse_nothing() -> None:
    """By a guard of the traced program, or by checks at run time."""
    backed = make_symbol(SymT.SIZE, 0, integer=True)
    guards = [SimpleNamespace(expr=sympy.Eq(Mod(backed, 8), 0))]
    graph = SimpleNamespace(sizevars=SimpleNamespace(shape_env=SimpleNamespace(guards=guards)))
    with V.set_graph_handler(graph):
        assert can_occur({backed: 16}) and not can_occur({backed: 17})
        assert not can_occur({backed: 16, make_symbol(SymT.UNBACKED_INT, 0, integer=True): 3})


@needs_cross_export
def test_an_export_that_would_go_outside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "loop_index_inversion_in_fusion", True)
    program = torch.export.export(Repeated(), (torch.randn(16),))
    reports: list[AccessReport] = []
    with pytest.raises(OutOfBoundsError, match="export with another torch version"):
        targets.lower({"forward": program}, "sm_90", on_accesses=reports.append)
    assert not reports


@needs_cross_export
@pytest.mark.exhaustive
def test_an_export_reports_its_accesses() -> None:
    reports: list[AccessReport] = []
    targets.lower({"forward": torch.export.export(Repeated(), (torch.randn(16),))}, "sm_90", on_accesses=reports.append)
    (report,) = reports
    assert not any(NOT_CHECKED in text for text in report.undecided)
    assert str(report) == f"{report.proven} loads and stores of {report.kernels} generated kernels inside their buffers"
