"""Exports of quantized checkpoints: what is said, `--check`, linear layers that keep their codes, the artifact."""

from __future__ import annotations

import dataclasses
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import nn

from executorch_moe.backends.artifact.method_targets import pick_cpu_methods
from executorch_moe.backends.runtime import load
from executorch_moe.export.build import prepare_, stream, trace_methods, usual_scheme
from executorch_moe.export.check import check_export, load_prepared
from executorch_moe.export.checkpoint.deviation import Deviation
from executorch_moe.export.checkpoint.gguf.folder import find_folder
from executorch_moe.export.checkpoint.streaming import StreamedModel
from executorch_moe.export.checkpoint.work_folder import WorkFolder
from executorch_moe.export.models.causal_lm import CausalLM
from executorch_moe.export.models.linears import Int4Linear
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.report.metadata import check_report
from executorch_moe.export.report.stored_weights import stored_weights
from executorch_moe.kernels import Int4Codes

from ...cli.refusals import refused
from .stored import GATE, H, Saved, edit, edit_json, experts_of, save_gpt_oss, streamed
from .test_awq import save_awq
from .test_gptq import save_gptq

CONTEXT = 16


def options_for(folder: Path, out: Path | None = None, target: str = "cpu", **choices: Any) -> ExportOptions:
    return ExportOptions(str(folder), out, target=Target(target), context=Context(CONTEXT, "logits"), **choices)


def symmetric(folder: Path) -> Saved:
    return save_gptq(folder, 64)


def with_zeros(folder: Path) -> Saved:
    return save_awq(folder, 64)


def packed_integers(folder: Path) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from .test_compressed_tensors import save_packed

    return save_packed(folder, 64)


def gguf_codes(folder: Path) -> Saved:
    pytest.importorskip("gguf", reason="needs the package gguf")
    if not hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
        pytest.skip("needs a transformers that converts tokenizers of GGUF files")
    from .gguf_files import big_model, only, write

    return Saved(folder, write(folder / "model.gguf", big_model(), only("Q4_K")).reference, {})


@pytest.mark.parametrize("save", [symmetric, with_zeros, packed_integers])
@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_linear_layers_keep_their_codes(save: Callable[[Path], Saved], target: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    options = options_for(tmp_path, target=target, dense=Dense("int4"))
    model = stream(options, tmp_path)
    model.load()
    prepare_(model.model, options)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    whole = torch.cat([saved.values[f"model.layers.0.{name}.weight"] for name in names])
    (found,) = (
        _weight(module)
        for name, module in model.model.named_modules()
        if name.endswith(("qkv_proj", "self_attn.q_proj.merged") if target != "cpu" else "self_attn.k_proj")
    )
    expected = whole if target != "cpu" else saved.values["model.layers.0.self_attn.k_proj.weight"]
    # One rounding of scales to bf16, and one of zero points.
    assert (found - expected).norm() / expected.norm() < 6e-3


def _weight(linear: nn.Module, width: int = H) -> torch.Tensor:
    """The weight of a linear layer, from what it makes of unit vectors."""
    one = torch.eye(width, dtype=torch.float32)
    many = linear(one).float().t()
    if isinstance(linear, Int4Linear):
        alone = torch.stack([linear(row[None])[0] for row in one], 1)
        assert (alone - many).norm() / many.norm() < 1e-6
    return many.detach()


@pytest.mark.parametrize("save", [symmetric, with_zeros, packed_integers, gguf_codes])
@torch.no_grad()
def test_a_model_whose_linear_layers_keep_their_codes(save: Callable[[Path], Saved], tmp_path: Path) -> None:
    """The modules of a CUDA target, run eagerly on the CPU."""
    saved = save(tmp_path)
    dense, target = Dense("int4", lm_head="none"), Target("sm_90", "fp32")
    given = tmp_path / "model.gguf" if save is gguf_codes else tmp_path
    options = dataclasses.replace(options_for(given, target="sm_90", dense=dense), target=target)
    model = stream(options, find_folder(str(given)))
    model.load()
    (line,) = stored_weights(model, [], options)
    layers = len(saved.reference.model.layers)
    assert f"{4 * layers} linear layers with codes kept as int4" in line
    prepare_(model.model, options)
    assert sum(isinstance(module, Int4Linear) for module in model.model.modules()) == 2 * layers
    module = CausalLM(model.model, CONTEXT)
    compare(lambda method, *given: module(*given), saved)
    if save is with_zeros:
        result = check_export(options)
        assert result.passed and not result.missing, result.findings


@pytest.mark.parametrize(("key", "value"), [("Q4_1", "Q4_0"), ("Q4_0", "Q8_0")])
def test_merged_layers_keep_the_codes_that_there_are(key: str, value: str, tmp_path: Path) -> None:
    """Queries, keys and values in several types, as in most GGUF files, become one layer."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    if not hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
        pytest.skip("needs a transformers that converts tokenizers of GGUF files")
    from .gguf_files import SIZE, big_model, write

    kinds = {"attn_k.": key, "attn_v.": value, "attn_q.": "Q4_0", "attn_output": "Q4_0"}
    path = tmp_path / "model.gguf"
    written = write(path, big_model(), lambda name: next((kinds[part] for part in kinds if part in name), "F32"))
    options = options_for(path, target="sm_90", dense=Dense("int4", lm_head="none"))
    model = stream(options, find_folder(str(path)))
    model.load()
    (line,) = stored_weights(model, [], options)
    kept = 4 if value == "Q4_0" else 3
    assert f"{kept} linear layers with codes kept as int4" in line
    assert ("1 linear layer dequantized to bf16, then quantized to int4" in line) == (kept == 3)
    prepare_(model.model, options)
    (found,) = (_weight(m, SIZE) for n, m in model.model.named_modules() if n.endswith(("qkv_proj", "q_proj.merged")))
    attention = written.reference.model.layers[0].self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    for name, actual, part in zip("qkv", found.split([len(p.weight) for p in parts]), parts, strict=True):
        bound = 0.15 if name == "v" and kept == 3 else 6e-3
        assert (actual - part.weight).norm() < bound * part.weight.norm(), name


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_the_check_traces_what_an_export_traces(target: str, tmp_path: Path) -> None:
    save_awq(tmp_path, 64)
    options = options_for(tmp_path, target=target, dense=Dense("int4"))
    loaded, empty = stream(options, tmp_path), stream(options, tmp_path)
    loaded.load()
    prepare_(loaded.model, options)
    load_prepared(empty, options)
    shapes = [{name: (t.shape, t.dtype) for name, t in m.model.state_dict().items()} for m in (loaded, empty)]
    assert shapes[0] == shapes[1]


def test_the_check_says_what_becomes_of_the_weights(tmp_path: Path) -> None:
    save_gptq(tmp_path, 64)
    result = check_export(options_for(tmp_path))
    assert result.passed, result.findings
    (line,) = (finding.found for finding in result.findings if finding.name == "stored weights")
    start = (
        "stored as GPTQ, 4 bits, groups of 64, symmetric (declared in config.json): 1 expert layer with codes kept "
        "as w4a16"
    )
    assert line.startswith(start) and "4 linear layers dequantized to fp32" in line


@pytest.mark.parametrize("zeros", [False, True])
def test_the_error_is_that_of_the_values(zeros: bool) -> None:
    """It is computed from sums over codes, without the values."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (3, 16, 128), generator=generator).to(torch.int8)
    scale = torch.rand(3, 16, 4, generator=generator) / 32
    exact = Int4Codes(q, scale, scale * 3.3 if zeros else None)
    slow, fast = Deviation(), Deviation()
    slow.add(exact.rounded().dequantize(), exact.dequantize())
    fast.add_rounded(exact.rounded(), exact)
    assert 1e-3 < slow.relative() < 4e-3 and fast.relative() == pytest.approx(slow.relative(), rel=1e-3)


def without_scales(folder: Path) -> None:
    edit(folder, lambda weights: weights.pop(f"{GATE}.scales"))


def with_mixed_groups(folder: Path) -> None:
    mixed = (torch.arange(H) % 2).to(torch.int32)
    edit(folder, lambda weights: weights.update({f"{GATE}.g_idx": mixed}))


def with_other_bits(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_scales, f"has {GATE}.qweight but lacks {GATE}.scales"),
        (with_mixed_groups, f"{GATE}.qweight has groups of weights that are not consecutive"),
        (with_other_bits, "bits=8 of config.json, which is not supported yet"),
    ],
)
def test_nothing_is_written_before_a_refusal(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_gptq(tmp_path / "model", 64)
    damage(tmp_path / "model")
    for how in (("-o", tmp_path / "x.pte"), ("--check",)):
        line = refused("export", tmp_path / "model", "--target", "cpu", *how, steps=("reading headers",))
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_written_for_a_truncated_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    from .gguf_files import big_model, only, write

    (tmp_path / "made").mkdir()
    whole = write(tmp_path / "made" / "model.gguf", big_model(), only("Q4_0")).path
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "cut.gguf").write_bytes(whole.read_bytes()[:-1000])
    line = refused("export", folder / "cut.gguf", "--target", "cpu", "-o", folder / "x.pte")
    assert "cut.gguf is cut short, damaged or not a GGUF file" in line and "download it again" in line
    assert [path.name for path in folder.iterdir()] == ["cut.gguf"]


def test_packing_continues_where_it_stopped(tmp_path: Path) -> None:
    save_awq(tmp_path / "model", 64)
    first = streamed(tmp_path / "model")
    with WorkFolder(tmp_path / "work", first.manifest()) as work:
        (record,) = first.load(work)
    second = streamed(tmp_path / "model")
    second._pack = pytest.fail  # type: ignore[method-assign, assignment]
    with WorkFolder(tmp_path / "work", second.manifest()) as work:
        assert second.load(work) == [record] and record.error
    assert torch.equal(experts_of(first).w13, experts_of(second).w13)


def test_memory_holds_a_few_experts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are read as experts are packed: never more than a run of them."""
    save_gptq(tmp_path)
    sizes: list[int] = []
    pack = StreamedModel._pack_codes

    def watched(self: StreamedModel, reader: Any, layer: Any, kept: Any, run: slice, *rest: Any) -> Any:
        sizes.append(run.stop - run.start)
        return pack(self, reader, layer, kept, run, *rest)

    monkeypatch.setattr(StreamedModel, "_pack_codes", watched)
    model = streamed(tmp_path)
    model.load()
    assert sizes == [1] * 4


def packed_integers(folder: Path) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from .test_compressed_tensors import save_packed

    return save_packed(folder, 64, symmetric=False)


def fp8_rows(folder: Path) -> Saved:
    from .test_fp8 import save_defined

    return save_defined(folder, "fbgemm_fp8", "channel")


def nvfp4(folder: Path) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from .test_fp4 import save_fp4

    return save_fp4(folder, "nvfp4-pack-quantized")


def gguf_latents(folder: Path) -> Saved:
    """DeepSeek-V3."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    if not hasattr(importlib.import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"):
        pytest.skip("needs a transformers that converts tokenizers of GGUF files")
    from .gguf_files import only, write
    from .test_gguf_families import model_of

    written = write(folder / "model.gguf", model_of("deepseek_v3"), only("Q4_0"), "deepseek2")
    return Saved(folder, written.reference, {})


@pytest.mark.parametrize(
    ("save", "scheme"),
    [
        (symmetric, "w4a16"),
        (with_zeros, "w4a16"),
        (packed_integers, "w4a16"),
        (fp8_rows, "bf16"),
        (nvfp4, "bf16"),
        (save_gpt_oss, "mxfp4"),
        pytest.param(gguf_codes, "w4a16", marks=pytest.mark.exhaustive),
        (gguf_latents, "w4a16"),
    ],
)
@torch.no_grad()
def test_exported_programs(save: Callable[[Path], Saved], scheme: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    given = tmp_path / "model.gguf" if (tmp_path / "model.gguf").exists() else tmp_path
    options = options_for(given, experts=Experts(scheme))
    model = stream(options, find_folder(str(given)))
    model.load()
    prepare_(model.model, options)
    _, programs = trace_methods(model.model, options, CONTEXT)
    methods: dict[str, Any] = {method: programs[name].module() for method, name in pick_cpu_methods(programs).items()}

    def run(method: str, *given: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = methods[method](*given)
        if method == "prefill":  # programs that are called from Python have a cache each
            caches = dict(methods["prefill"].named_buffers())
            for name, buffer in methods["decode"].named_buffers():
                if "kv_cache" in name:
                    buffer.copy_(caches[name])
        return logits

    compare(run, saved)


@pytest.mark.slow
@pytest.mark.parametrize("lowered", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_gguf_file(lowered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executorch_runtime: None) -> None:
    """`--check`, names in messages, and the artifact; test_gpt_oss_as_published always lowers kept codes."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    from .gguf_files import big_model, only, write

    written = write(tmp_path / "model.gguf", big_model(), only("Q4_K"))
    result = check_export(options_for(written.path))
    assert result.passed, result.findings
    (line,) = (finding.found for finding in result.findings if finding.name == "stored weights")
    said = "stored as GGUF with Q4_K (model.gguf): 1 expert layer with codes kept as w4a16, groups of 32"
    assert line.startswith(said)
    out, lines = tmp_path / "gguf.pte", io.StringIO()
    with pytest.raises(ValueError, match=r"model.gguf' is a file of the model: choose another"):
        check_report(written.path, options_for(written.path, out))
    if lowered:
        export_model(options_for(written.path, out), Console(file=lines, width=400))
    else:
        monkeypatch.setattr("executorch_moe.backends.lower.lower", mock.Mock(side_effect=OSError("traced")))
        with pytest.raises(OSError, match="traced"):
            export_model(options_for(written.path, out), Console(file=lines, width=400))
    assert "checking model.gguf" in lines.getvalue() and "codes kept as w4a16" in lines.getvalue()
    if lowered:
        program = load(out)
        compare(lambda method, *given: program.run(method, *given)[0], Saved(tmp_path, written.reference, {}))


# test_exported_programs has what is lowered here, and test_gpt_oss_as_published lowers kept codes in `make test` too.
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("save", [symmetric, with_zeros])
def test_artifacts(save: Callable[[Path], Saved], tmp_path: Path, executorch_runtime: None) -> None:
    saved = save(tmp_path / "model")
    out, lines = tmp_path / "kept.pte", io.StringIO()
    summary = export_model(options_for(tmp_path / "model", out), Console(file=lines, width=400))
    assert "1 expert layer with codes kept as w4a16, groups of 64" in lines.getvalue()
    assert "4 linear layers dequantized to fp32" in lines.getvalue()
    assert summary.report.layers[0].algorithm == "kept"
    program = load(out)
    compare(lambda method, *given: program.run(method, *given)[0], saved)


@pytest.mark.slow
def test_gpt_oss_as_published(tmp_path: Path, executorch_runtime: None) -> None:
    """Without --scheme, experts in MXFP4 keep their codes."""
    saved = save_gpt_oss(tmp_path / "model")
    assert usual_scheme(str(tmp_path / "model")) == "mxfp4"
    options = options_for(tmp_path / "model", tmp_path / "kept.pte", experts=Experts("mxfp4"))
    result = check_export(options)
    assert result.passed, result.findings
    lines = io.StringIO()
    summary = export_model(options, Console(file=lines, width=400))
    assert "with codes kept as mxfp4, groups of 32, scales exact, relative error 0.0e+00" in lines.getvalue()
    assert {(layer.algorithm, layer.scheme) for layer in summary.report.layers} == {("kept", "mxfp4")}
    program = load(options.pte)
    compare(lambda method, *given: program.run(method, *given)[0], saved)


def test_the_usual_scheme(tmp_path: Path) -> None:
    symmetric(tmp_path / "gptq")
    assert usual_scheme(str(tmp_path / "gptq")) == "w4a16"
    assert usual_scheme("synthetic:tiny") == usual_scheme(str(tmp_path / "none")) == "w4a16"


@torch.no_grad()
def compare(run: Callable[..., torch.Tensor], saved: Saved) -> None:
    """Compares logits and greedy tokens of methods with those of transformers on the dequantized weights."""
    reference = CausalLM(saved.reference, CONTEXT)
    given = torch.tensor([[5, 17, 40, 3]]), torch.arange(4)
    for _ in range(8):
        actual, expected = run("prefill" if given[0].shape[1] > 1 else "decode", *given), reference(*given)
        assert (actual - expected).norm() / expected.norm() < 1e-2
        assert int(actual.argmax()) == int(expected.argmax())
        given = expected.argmax().reshape(1, 1), given[1][-1:] + 1
