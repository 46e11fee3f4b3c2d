"""The contents of an artifact and the choices of its compilation, as tables and JSON."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from executorch_moe.backends.artifact.cubin import GpuCode
from executorch_moe.backends.artifact.inspect import ArtifactReport, DelegateReport, MethodReport
from executorch_moe.backends.cuda.cross.report import CrossCompileReport, GemmChoice, KernelChoice
from executorch_moe.backends.fusion import FusionReport
from executorch_moe.export.cli.app import app
from executorch_moe.export.report.inspection import check_archs, kernels_table, report_json
from executorch_moe.kernels.gpus import find_model

runner = CliRunner()


def compiled() -> CrossCompileReport:
    report = CrossCompileReport(find_model("l4"))
    report.kernels.append(KernelChoice("decode", "moe_grouped_gemm", 1, {"BLOCK_M": 64, "num_warps": 8}, 73728))
    report.kernels.append(KernelChoice("decode", "triton_tem_0", 3, {"num_warps": 4}, 12288))
    report.gemms.append(GemmChoice("decode", (1, 128), 19, "triton_mm BLOCK_M=16"))
    return report


def of(**methods: tuple[int, ...]) -> ArtifactReport:
    """A report of methods with code for these architectures."""

    def method(archs: tuple[int, ...]) -> MethodReport:
        codes = tuple(GpuCode("cubin", sm, sm == 90, ("moe_a",), 10) for sm in archs)
        return MethodReport((DelegateReport("CudaBackend", codes),), (), (), ())

    named = {name.replace("__", "@"): method(archs) for name, archs in methods.items()}
    return ArtifactReport(Path("model.pte"), None, named, (), {})


def test_choices_as_a_table() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(kernels_table(compiled()))
    text = console.export_text()
    assert "compiled for NVIDIA L4 (sm_89)" in text and "GEMM 1x128" in text and "triton_mm BLOCK_M=16" in text
    lines = {line.split("│")[2].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "our tables, 1 of 1" in lines["moe_grouped_gemm"] and "73728 of 101376" in lines["moe_grouped_gemm"]
    assert "BLOCK_M=64, num_warps=8" in lines["moe_grouped_gemm"] and "Inductor" in lines["triton_tem_0"]


@pytest.mark.slow
def test_inspect_and_report_of_an_export(exported: Callable[..., Path], tmp_path: Path) -> None:
    pte = exported("w4a16", "cpu")
    result = runner.invoke(app, ["inspect", str(pte)])
    assert result.exit_code == 0, result.output
    assert "prefill" in result.stdout and "decode" in result.stdout and ".ptd" in result.stdout
    inside = json.loads(runner.invoke(app, ["inspect", str(pte), "--format", "json"]).stdout)
    assert set(inside["methods"]) == {"forward", "prefill@cpu", "decode@cpu"} and inside["archs"] == []
    assert inside["sizes"][".pte"] == pte.stat().st_size
    assert inside["sizes"]["experts"] == 2 * (131072 + 65536 + 16384 + 8192) and "state" not in inside["sizes"]
    assert "442,368" in result.stdout
    report = json.loads(report_json(FusionReport().json(), [compiled()], pte))
    assert report["sizes"] == inside["sizes"] and report["layers"] == []
    (target,) = report["compiled"]
    assert target["target"] == "l4" and target["shared"] == 73728 and target["max_shared"] == 101376
    assert [kernel["ours"] for kernel in target["kernels"]] == [True, False]
    result = runner.invoke(app, ["inspect", str(pte), "--target", "sm_90"])
    assert (
        result.exit_code == 2
        and "decode has code for no GPU; forward has code for no GPU; prefill has code" in result.stderr
    )


def test_inspect_refuses() -> None:
    result = runner.invoke(app, ["inspect", "no-such.pte"])
    assert result.exit_code == 2 and "program no-such.pte does not exist" in result.stderr
    result = runner.invoke(app, ["inspect", "no-such.pte", "--format", "xml"])
    assert result.exit_code == 2 and "--format 'xml' is unknown: use one of table, json" in result.stderr


@pytest.mark.slow
def test_several_artifacts_are_one_line_each(exported: Callable[..., Path], tmp_path: Path) -> None:
    first, none = exported("w4a16", "cpu"), tmp_path / "none.pte"
    second = shutil.copytree(first.parent, tmp_path / "copy") / first.name
    result = runner.invoke(app, ["inspect", str(first), str(none), str(second)])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: program {none} does not exist: ")
    assert len(result.stderr.splitlines()) == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{first}: decode@cpu, forward, prefill@cpu; no delegates; ")
    assert re.search(r" kB \.pte \+ .* kB \.ptd$", lines[1])
    # The same to a file, as JSON, and whole.
    out = tmp_path / "lines"
    assert runner.invoke(app, ["inspect", str(first), str(second), "-o", str(out)]).stdout == ""
    assert out.read_text().splitlines() == lines
    listed = json.loads(runner.invoke(app, ["inspect", str(first), str(second), "--format", "json"]).stdout)
    assert [entry["artifact"] for entry in listed] == [str(first), str(second)]
    assert runner.invoke(app, ["inspect", "-v", str(first), str(second)]).stdout.count("experts") == 2
    result = runner.invoke(app, ["inspect", "--target", "sm_90", str(first), str(second)])
    assert result.exit_code == 2 and result.stderr.count("has code for no GPU") == 6
    assert runner.invoke(app, ["inspect", "--verify", str(first), str(second)]).stdout.count("are whole") == 2


def test_code_for_other_gpus_than_asked_for() -> None:
    check_archs(of(prefill=(90,), decode=(90,)), "h200")
    both = of(decode__sm_80=(80,), decode__sm_90=(90,), prefill__sm_80=(80,), prefill__sm_90=(90,))
    check_archs(both, "sm_90,a100")
    with pytest.raises(ValueError, match=r"model\.pte: decode has code for sm_80, sm_90; prefill .* --target sm_90"):
        check_archs(both, "sm_90")
    with pytest.raises(
        ValueError, match=r"model\.pte: prefill has code for sm_86: export it again with --target sm_90"
    ):
        check_archs(of(prefill=(86,), decode=(90,)), "sm_90")
