"""`export --check`: its findings for a good model, and that each check can fail."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from executorch_moe.backends.fusion.recognize import ExpertLayout
from executorch_moe.export import build
from executorch_moe.export import check as checking
from executorch_moe.export.cli.app import app
from executorch_moe.export.models import keywords
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model

from ..families import COMMON, by_name

pytest.importorskip("transformers")


def check(*arguments: str, model: Path | str = "tiny") -> Any:
    return CliRunner().invoke(app, ["export", str(model), "--check", *arguments], terminal_width=200)


def findings(output: str) -> dict[str, str]:
    """Name of a check -> the mark beside it."""
    rows = (line.split("│") for line in output.splitlines() if line.count("│") == 4)
    return {row[2].strip(): row[1].strip() for row in rows if row[1].strip()}


NAMES = ["checkpoint", "experts", "trace", "fuse", "weights"]


@pytest.mark.slow
def test_a_good_model_passes_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = check("--max-context", "64")
    assert result.exit_code == 0, result.output
    expected = [*NAMES, "operators, prefill", "operators, decode", "numerics"]
    assert findings(result.stderr) == dict.fromkeys(expected, "ok")
    assert re.search(r"16 tokens, which chose \d of 8 experts", " ".join(result.stderr.replace("│", " ").split()))
    assert list(tmp_path.iterdir()) == []


class Traced(Exception):
    """Ends an export that has traced its methods."""


def calls(programs: Any) -> dict[str, list[tuple[str, str, str]]]:
    """Method -> what it calls in order, and on what."""
    return {
        name: [(node.op, str(node.target), _kind(node.meta.get("val"))) for node in program.graph.nodes]
        for name, program in programs.items()
    }


def _kind(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "one_token"),
    [
        pytest.param({"target": Target("sm_90")}, True, marks=pytest.mark.exhaustive),
        ({"target": Target("sm_90"), "dense": Dense("int8", None, "int8"), "context": Context(64, "greedy")}, True),
        ({"target": Target("sm_90", "fp32"), "dense": Dense("int4", "int8"), "context": Context(64, "logits")}, False),
        ({"target": Target("sm_90"), "experts": Experts(implementation="upstream")}, True),
        ({"target": Target("cpu"), "dense": Dense("int8")}, False),
    ],
    ids=["sm_90", "int8-greedy", "int4-int8-fp32-logits", "upstream", "cpu-int8"],
)
def test_what_is_traced_is_what_an_export_traces(
    choices: dict[str, Any], one_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`one_token`: decode has the operators that only CUDA targets use."""
    exported: list[Any] = []
    checked: list[Any] = []

    def lower(programs: Any, *_: object, **__: object) -> None:
        exported.append(calls(programs))
        raise Traced

    def traced(*arguments: Any) -> Any:
        module, programs = build.trace_methods(*arguments)
        checked.append(calls(programs))
        return module, programs

    monkeypatch.setattr("executorch_moe.backends.lower.lower", lower)
    monkeypatch.setattr(checking, "trace_methods", traced)
    monkeypatch.setattr(checking, "check_numerics", lambda *_: None)
    options = ExportOptions("tiny", tmp_path / "x.pte", **({"context": Context(64)} | choices))
    with pytest.raises(Traced):
        export_model(options)
    result = checking.check_export(replace(options, out=None))
    assert result.passed, result.findings
    assert exported == checked
    (decode,) = (nodes for name, nodes in checked[0].items() if name.startswith("decode"))
    assert one_token == any("one_token_attention" in target for _, target, _ in decode)


def without_position_ids() -> dict[str, Any]:
    """Another table, because an entry that is deleted and put back would be the last one for the tests that follow."""
    return {name: accepts for name, accepts in keywords.HARMLESS.items() if name != "position_ids"}


def test_a_cache_that_refuses_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of transformers would call it: refused while the model's structure is found."""
    monkeypatch.setattr(keywords, "HARMLESS", without_position_ids())
    result = check("--target", "sm_90", "--max-context", "64")
    assert result.exit_code == 2
    assert "the cache was called with the unknown argument 'position_ids'" in result.stderr
    assert "install a transformers version that `executorch-moe doctor` accepts" in result.stderr


def test_a_layer_of_ours_that_refuses_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but only while tracing."""

    def trace_methods(*arguments: Any) -> Any:
        monkeypatch.setattr(keywords, "HARMLESS", without_position_ids())
        return stock(*arguments)

    stock = checking.trace_methods
    monkeypatch.setattr(checking, "trace_methods", trace_methods)
    monkeypatch.setattr(checking, "check_numerics", lambda *_: None)
    result = check("--target", "sm_90", "--max-context", "64")
    assert result.exit_code == 2
    assert findings(result.stderr) == {"checkpoint": "ok", "experts": "ok", "trace": "fail"}
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "ValueError: OneTokenDecoderLayer was called with the unknown argument 'position_ids'" in said


@pytest.mark.slow
def test_operators_and_numerics_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    real, unpack = Qwen3MoeRMSNorm.forward, checking.unpack_experts

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        normed: Tensor = real(self, hidden_states)
        return normed + 0 * torch.histc(normed.float(), 4).sum().to(normed.dtype)

    monkeypatch.setattr(Qwen3MoeRMSNorm, "forward", forward)
    # A reference that is not what was packed.
    monkeypatch.setattr(checking, "unpack_experts", lambda packed: (unpack(packed)[0] * 1.5, unpack(packed)[1]))
    result = check("--max-context", "64", "--verbose")
    assert result.exit_code == 2
    assert findings(result.stderr) == {
        **dict.fromkeys(NAMES, "ok"),
        **dict.fromkeys(["operators, prefill", "operators, decode", "numerics"], "fail"),
    }
    # The other norms are part of operators.
    places = set(re.findall(r"aten\.histc in (\S+) \(Qwen3MoeRMSNorm\)", result.stderr))
    assert places == {"model.model.layers.0.input_layernorm", "model.model.norm"}


@torch.no_grad()
def test_an_expert_of_an_early_token_counts() -> None:
    """The logits after each token are compared: one that only the first tokens choose shows in no others."""
    options = ExportOptions("tiny", target=Target("cpu"))
    fused, reference, layers, _ = checking.probe_models(options, resolve("tiny"))
    per_token: list[list[int]] = []
    experts: Any = reference.get_submodule("model.layers.0.mlp.experts")
    hook = experts.register_forward_pre_hook(lambda _, args: per_token.extend(args[1].tolist()))
    with checking.chosen_experts(reference) as chosen:
        assert checking.logits_error(fused, reference) < checking.BOUNDS["w4a16"]
    hook.remove()
    assert layers == 1 and len(per_token) == checking.PROBE_TOKENS
    assert chosen == {"model.layers.0.mlp.experts": ({e for ids in per_token for e in ids}, 8)}
    # An expert whose weights say nothing of the last two tokens. In the reference, it alone is spoiled.
    counts = {e: sum(e in ids for ids in per_token) for e in range(8)}
    unseen = [e for e in range(8) if counts[e] and not any(e in ids for ids in per_token[-2:])]
    experts.down_proj[max(unseen, key=counts.__getitem__)] *= 3
    assert checking.logits_error(fused, reference) > checking.BOUNDS["w4a16"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "chosen"), [("mixtral", "[34] of 4"), ("gpt_oss", "[78] of 8")])
def test_the_numerics_of_other_families(name: str, chosen: str, tmp_path: Path) -> None:
    family = by_name(name)
    model: Any = replace(family, options=family.options | {"num_hidden_layers": 2}).model()
    model.save_pretrained(tmp_path)
    options = ExportOptions(str(tmp_path), target=Target("cpu"))
    result = checking.CheckResult(options)
    checking.check_numerics(result, options, tmp_path)
    (finding,) = result.findings
    assert finding.passed and re.search(f"which chose {chosen} experts", finding.found)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    result = check("--group-size", "256")
    assert result.exit_code == 2
    assert "must be a multiple of --group-size 256" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("spoil", [None, "no tokenizer"])
def test_a_tokenizer_that_export_would_refuse(spoil: str | None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve("tiny"), tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink() if spoil is None else path.write_text(spoil)
    result = check(model=folder)
    assert result.exit_code == 2
    assert "has no usable tokenizer" in result.stderr and "put the model's tokenizer.json there" in result.stderr


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A model whose o_proj has 48 columns."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**COMMON, **by_name("qwen3_moe").options, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | {"head_dim": 16}))
    model.save_pretrained(tmp_path / "odd")
    return Path(shutil.copy(resolve("tiny") / "tokenizer.json", tmp_path / "odd")).parent


@pytest.mark.parametrize(
    ("target", "dense", "message"),
    [
        ("cpu", "int8", "o_proj has a weight [64, 48], and --dense 'int8' needs a multiple of 32 columns: use"),
        ("cpu", "int4", "o_proj has a weight [64, 48], and --dense 'int4' needs a multiple of 32 columns: use"),
        ("cuda", "int4", "o_proj has 48 inputs, which --group-size 32 does not divide: choose another"),
    ],
)
def test_widths_that_dense_does_not_fit(
    target: str, dense: str, message: str, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --check and by an export before it packs anything."""
    result = check("--target", target, "--dense", dense, model=odd)
    assert result.exit_code == 2 and message in result.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "x.pte"
    command = ["export", str(odd), "-o", str(out), "--target", target, "--dense", dense]
    result = CliRunner().invoke(app, command, terminal_width=200)
    assert result.exit_code == 2 and message in result.stderr and "packing" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize("order", ["gate, up", "interleaved", "up, gate"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stored_is_the_inverse_of_canonical(order: str, transposed: bool) -> None:
    layout = ExpertLayout(("gate_up",), "down", transposed, order, "gate_up_bias", "down_bias", "silu")
    weights = (torch.randn(3, 8, 6), torch.randn(3, 6, 4), torch.randn(3, 8), torch.randn(3, 6))
    assert all(map(torch.equal, layout.canonical(layout.stored(*weights)), weights))  # type: ignore[arg-type]
    apart = ExpertLayout(("gate", "up"), "down", transposed, "gate, up", None, None, "silu")
    stored = apart.stored(*weights[:2])
    assert all(map(torch.equal, apart.canonical(stored)[:2], weights[:2]))  # type: ignore[arg-type]
    assert stored["gate"].shape == ((3, 6, 4) if transposed else (3, 4, 6))
