"""Names and spellings of options: in help, in errors, and those of earlier versions."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table

from executorch_moe.export.cli.app import app
from executorch_moe.export.cli.names import with_option_names
from executorch_moe.export.progress import OneLineConsole

from .refusals import refused, runner

COMMANDS = [
    [], ["export"], ["generate"], ["bench"], ["bench", "model"], ["bench", "kernel"], ["tune"], ["inspect"], ["doctor"]
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_short_to_ask_for_and_shows_no_type_of_flags(command: list[str]) -> None:
    short, long = (runner.invoke(app, [*command, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.output == long.output
    assert not re.search(r"<bool>|BOOLEAN|--thin|export-child", short.output)


def test_help_of_export_is_grouped() -> None:
    shown = runner.invoke(app, ["export", "-h"]).output
    panels = re.findall(r"^╭─ (.*?) ─", shown, re.MULTILINE)
    expected = ["What is exported", "Output", "Experts", "Other layers", "Target", "Synthetic models", "Debugging"]
    assert panels == ["Arguments", "Options", *expected]


def test_a_letter_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[str]] = {}

    def collect(command: Any) -> None:
        for param in command.params:
            longs = [opt for opt in param.opts if opt.startswith("--")]
            for opt in param.opts:
                if len(opt) == 2 and not param.hidden:
                    meanings.setdefault(opt, set()).add(longs[0])
        for child in getattr(command, "commands", {}).values():
            collect(child)

    collect(typer.main.get_command(app))
    assert meanings["-o"] == {"--out"} and meanings["-p"] == {"--prompt"} and meanings["-v"] == {"--verbose"}
    assert all(len(names) == 1 for names in meanings.values()), meanings


@pytest.mark.parametrize(
    ("message", "given", "shown"),
    [
        ("K=100 must be a multiple of group_size=48", {}, "K=100 must be a multiple of --group-size 48"),
        ("use target='cpu' (target='h200')", {}, "use --target 'cpu' (--target 'h200')"),
        ("placeholder_weights=True is for", {}, "--placeholder-weights is for"),
        ("choose another group_size", {}, "choose another --group-size"),
        ("lm_head has 48 inputs, lm_head='int8'", {}, "lm_head has 48 inputs, --lm-head 'int8'"),
        # Fields of a synthetic model, unless the option was given.
        ("experts=8 of tiny, layers=9 of tiny", {"layers": None}, "experts=8 of tiny, layers=9 of tiny"),
        ("experts='theirs', layers=9", {"layers": 9}, "--experts 'theirs', --layers 9"),
        ("synthetic:tiny,layers=9 in /tmp/group_size/x", {"layers": 9}, "synthetic:tiny,layers=9 in /tmp/group_size/x"),
        ("num_experts_per_tok=99 of config.json", {}, "num_experts_per_tok=99 of config.json"),
    ],
)
def test_errors_name_options(message: str, given: dict[str, Any], shown: str) -> None:
    assert with_option_names(message, typer.main.get_command(app), given) == shown


def test_output_is_wrapped_on_terminals_only() -> None:
    table = Table("a", "b")
    table.add_row("word " * 60, "x")
    for terminal in (True, False):
        file = io.StringIO()
        console = OneLineConsole(file=file, force_terminal=terminal, _environ={"COLUMNS": "80"})
        console.print("word " * 60)
        console.print(table)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
        assert max(map(len, lines)) <= 80 if terminal else lines[0].rstrip() == ("word " * 60).rstrip()


def test_earlier_spellings_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("executorch_moe.export.pipeline.export_model", lambda options, _: given.append(options))
    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr(
        "executorch_moe.export.own_process.export_in_own_process", lambda request, debug: given.append(request.options)
    )
    command = ["export", "synthetic:tiny", "-o", str(tmp_path / "x.pte"), "--target", "sm_90"]
    result = runner.invoke(app, [*command, "--thin"])
    assert result.stderr == "warning: --thin is deprecated: use --placeholder-weights\n"
    assert runner.invoke(app, [*command, "--placeholder-weights"]).stderr == ""
    assert [options.placeholder_weights for options in given] == [True, True] and given[0] == given[1]
    step = ("warning: -p is deprecated: use --prompt-tokens",)
    line = refused("bench", "model", tmp_path / "x.pte", "-p", "a", steps=step)
    assert "--prompt-tokens 'a' must be positive whole numbers" in line
    step = ("warning: -o json is deprecated: use --format",)
    line = refused("bench", "model", tmp_path / "x.pte", "-o", "json", "--prompt-tokens", "0", steps=step)
    assert "--prompt-tokens '0' must be positive" in line


def test_tables_keep_names_whole_at_80_columns() -> None:
    from executorch_moe.backends.fusion.report import FusedLayer, FusionReport
    from executorch_moe.export.options import ExportOptions, Target
    from executorch_moe.export.report.inspection import kernels_table, methods_table
    from executorch_moe.export.report.summary import ExportSummary

    from ..test_inspection import compiled, of

    sizes = {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
    values: dict[str, Any] = {
        "module": "model.model.layers.47.mlp.experts", "family": "Qwen3MoeExperts", "activation": "silu",
        "scheme": "w4a16", "group_size": 128, "algorithm": "minmax", "bytes_before": 10**9, "bytes_after": 10**8,
        "biases": False,
        **sizes,
    }  # fmt: skip
    report = FusionReport()
    report.add(FusedLayer(**values))
    summary = ExportSummary(ExportOptions("tiny", target=Target("cpu")), report, 128, 0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary.layers_table(), kernels_table(compiled()), methods_table(of(prefill=(90,), decode=(90,))))
    text = console.export_text()
    for name in (values["module"], "Qwen3MoeExperts:", "moe_grouped_gemm", "CudaBackend", "num_warps=8;", "sm_90"):
        assert str(name) in text, text
