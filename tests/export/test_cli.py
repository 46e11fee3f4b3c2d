"""The command line: what it prints, and that a user's mistake gives one line and exit status 2."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from executorch_moe.export.cli.app import app
from executorch_moe.export.generate.generator import Generation
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import ExportOptions
from executorch_moe.export.progress import Steps
from executorch_moe.export.report.metadata import check_report

runner = CliRunner()


def refused(*arguments: object, steps: tuple[str, ...] = ()) -> str:
    """The one line that a refused command prints; asserts status 2, no traceback, nothing on stdout."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # Above the error may stand the steps that went well, and the one that did not.
    *before, line = result.stderr.strip().splitlines()
    expected = all(step.startswith(("done ", *steps)) or step.endswith(" ...") for step in before)
    assert line.startswith("error: ") and expected, result.stderr
    return line


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(resolve("tiny"), tmp_path / "model"))


@pytest.mark.parametrize(
    "command", [[], ["export"], ["generate"], ["bench"], ["bench", "model"], ["inspect"], ["doctor"]]
)
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from executorch_moe.export import cli\n"
        "assert not {'torch', 'executorch', 'transformers', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "int4"), "scheme='int4' is unknown: use one of bf16, w4a16, w4a8"),
        (("--algorithm", "gptq"), "algorithm='gptq' is unknown: use one of minmax, hqq"),
        (("--target", "tpu"), "target='tpu' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "sm_90,sm_70"), "target='sm_90,sm_70' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "sm_90,cpu"), "target='sm_90,cpu' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "h100,h200"), "targets 'h100' and 'h200' are both sm_90, and an artifact holds code for an "),
        (("--target", "sm_70"), "target='sm_70' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--group-size", "48"), "group_size=48"),
        (("--group-size", "256"), "must be a multiple of group_size=256"),
        (("--max-context", "4096"), "max_context=4096 must be between 8 and the model's max_position_embeddings=512"),
        (("--max-context", "0"), "max_context=0 must be between"),
    ],
)
def test_export_options(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    line = refused("export", "tiny", "-o", tmp_path / "out" / "x.pte", "--target", "cpu", *arguments)
    # A later --target replaces the first.
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_export_target_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cuda")
    assert "target='cuda' needs a GPU" in line and "target='sm_90'" in line and "use target='cpu'" in line
    assert list(tmp_path.iterdir()) == []


def test_export_for_another_gpu_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused("export", "tiny", "-o", tmp_path / "x.pte", "--target", "h200")
    assert "cannot export for h200: the C++ compiler 'no-such-compiler' is not found: install g++" in line
    assert list(tmp_path.iterdir()) == []


def test_export_for_another_gpu_runs_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 3

    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr("executorch_moe.export.cli.app.run_to_the_end", run)
    result = runner.invoke(
        app,
        ["export", "tiny", "-o", str(tmp_path / "x.pte"), "--target", "h200", "--dtype", "bf16", "--algorithm", "hqq"],
    )
    assert result.exit_code == 3 and result.output == ""
    (command,) = commands
    assert command[1:5] == ["-m", "executorch_moe.export.cli.app", "export", "tiny"] and "--own-process" in command
    assert command[command.index("--target") + 1] == "h200" and command[command.index("--dtype") + 1] == "bf16"
    assert command[command.index("--algorithm") + 1] == "hqq"
    # The other process is asked for the same options, all of them.
    from executorch_moe.export.cli.app import export_in_own_process

    assert command[command.index("--own-process") + 1] == str(os.getpid())
    options = ExportOptions(
        "synthetic:tiny", tmp_path / "y.pte", "sm_90", "w4a8", 64, 77, "bf16", "logits", "upstream", "int4", "int8",
        "int8", 3, 11,
    )  # fmt: skip
    export_in_own_process(options, None, False)
    received: list[ExportOptions] = []
    monkeypatch.setattr("executorch_moe.export.own_process.end_with_parent", lambda parent: None)
    monkeypatch.setattr("executorch_moe.export.pipeline.export_model", lambda given, _: received.append(given))
    runner.invoke(app, commands[1][3:])
    assert received == [options]


@pytest.mark.parametrize(
    ("group", "how"),
    [(True, signal.SIGINT), (False, signal.SIGINT), (False, signal.SIGTERM)],
    ids=["Ctrl-C", "parent only", "asked to end"],
)
def test_an_interrupted_export_in_its_own_process_cleans_up(tmp_path: Path, group: bool, how: signal.Signals) -> None:
    """The other process gets the time that it needs, longer than `subprocess.run` would wait."""
    # A shell that starts tests in the background has them ignore Ctrl-C, and so would these.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = heed + (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], 'begun').touch()\n"
        "try: time.sleep(60)\n"
        "finally: time.sleep(1); pathlib.Path(sys.argv[1], 'cleaned').touch()"
    )
    parent = heed + (
        "import sys\n"
        "from executorch_moe.export import cli\n"
        "cli.INTERRUPTED_SECONDS = 3\n"
        "sys.exit(cli.run_to_the_end([sys.executable, '-c', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", parent, child, str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, how)
    assert process.wait(60) != 0
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "the export was ended by SIGKILL: memory may have run out: export where there is more"),
        (signal.SIGSEGV, "the export was ended by SIGSEGV: start it again"),
    ],
)
def test_a_killed_export_in_its_own_process_is_told_of(
    how: signal.Signals, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executorch_moe.backends.cuda.cross.target.check_target", lambda target: None)
    monkeypatch.setattr("executorch_moe.export.cli.app.run_to_the_end", lambda command: -how)
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "sm_90")
    assert refused(*command).endswith(message)
    (tmp_path / "x.work").mkdir()
    assert f"packed layers are kept in {tmp_path / 'x.work'}: the same" in refused(*command)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_an_export_in_its_own_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, pathlib, sys, time\n"
        "from executorch_moe.export.own_process import end_with_parent\n"
        "end_with_parent(int(sys.argv[1]))\n"
        "pathlib.Path(sys.argv[2], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, sys\n"
        "from executorch_moe.export.cli.app import run_to_the_end\n"
        "run_to_the_end([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(tmp_path)])
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    stat = Path("/proc", pid.read_text(), "stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    # Of a parent that had ended before the system was asked, nothing is heard any more.
    late = subprocess.run([sys.executable, "-c", child, "1", str(tmp_path)], timeout=60)
    assert late.returncode == 1


@pytest.mark.parametrize("where", ["packing", "writing"])
def test_an_export_to_a_full_disk_names_the_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python nor safetensors name it; and what stays is told of after every error."""
    import transformers.modeling_utils  # noqa: F401  imported below, it would keep what is put in save_file's place
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        if where == "packing":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lowered(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr("executorch_moe.backends.lower.lower", lowered)
    monkeypatch.setattr(
        "safetensors.torch.save_file" if where == "packing" else "executorch_moe.backends.artifact.files.save", full
    )
    kept = "packed layers are kept in "
    line = refused("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cpu", steps=(kept,))
    assert "No space left on device" in line
    file = "x.work/model.model.layers.0.mlp.experts.safetensors" if where == "packing" else "x.pte"
    assert str(tmp_path / file) in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.work"]
    assert not list(tmp_path.glob("x.work/.*.new*"))


@pytest.mark.parametrize("moment", ["build.StreamedModel.load", "pipeline.trace_methods"])
def test_an_interrupted_export_says_what_it_keeps(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"executorch_moe.export.{moment}", interrupted)
    result = runner.invoke(app, ["export", "tiny", "-o", str(tmp_path / "x.pte"), "--target", "cpu"])
    assert result.exit_code != 0 and "Traceback" not in result.stderr
    assert "x.work:thesamecommandgoesonfromthere" in "".join(result.stderr.split())  # however it is wrapped
    assert [path.name for path in tmp_path.iterdir()] == ["x.work"]


def test_steps_are_told_of_when_they_begin() -> None:
    """Without a terminal nothing turns, and a step may take minutes."""
    shown = io.StringIO()
    steps = Steps(Console(file=shown))
    with steps.step("lower", "lowering to sm_90", " (compiles kernels: minutes)"):
        assert shown.getvalue() == "lowering to sm_90 (compiles kernels: minutes) ...\n"
    with steps.counted("pack", "packing [a]", 2) as advance:
        assert shown.getvalue().endswith("s)\npacking [a] ...\n")
        advance(None)
    lines = shown.getvalue().splitlines()
    assert re.fullmatch(r"done lowering to sm_90 \(\d\.\d s\)", lines[1])
    assert re.fullmatch(r"done packing \[a\] \(\d\.\d s\)", lines[3]) and len(lines) == 4
    on_terminal = io.StringIO()
    with Steps(Console(file=on_terminal, force_terminal=True)).step("write", "writing"):
        pass
    assert "writing ..." not in on_terminal.getvalue() and "done" in on_terminal.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_notes_of_native_code_are_held_back_on_a_terminal() -> None:
    """ExecuTorch's C++ code writes through sys.stderr, in whose place rich likes to put itself."""
    import pty

    code = (
        "import sys\n"
        "from executorch_moe.export.cli.app import progress_on\n"
        "from executorch_moe.export.progress import spinner\n"
        "from executorch_moe.export.quiet import hold_native_notes\n"
        "with hold_native_notes() as terminal:\n"
        "    assert terminal.is_terminal\n"
        "    with spinner(terminal, 'loading'): print('a note', file=sys.stderr, flush=True)\n"
        "    with progress_on(terminal): print('a note', file=sys.stderr, flush=True)\n"
        "print('the end', file=sys.stderr)"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0, shown
    assert b"loading" in shown and b"the end" in shown and b"note" not in shown


def test_tune_keeps_other_packages_quiet(tmp_path: Path) -> None:
    code = "from executorch_moe.export.cli.app import main; main()"
    command = [sys.executable, "-c", code, "tune", "--shape", "qwen35", "--layers", "0", "--out", str(tmp_path / "t")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "error: layers=0 must be at least 1\n"


def test_export_reports_that_cannot_be_written(tmp_path: Path) -> None:
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cpu", "--report")
    assert "is a folder: give a file name" in refused(*command, tmp_path)
    (tmp_path / "file").write_text("")
    line = refused(*command, tmp_path / "file" / "r.json")
    assert "report=" in line and "is not a writable folder: choose another" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_reports_over_files_of_the_export(model_folder: Path, tmp_path: Path) -> None:
    """Nothing is begun, and what the model or an earlier export wrote is left as it was."""
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["x.pte", "x.ptd", "x.tokenizer.json", "x.export.json", "x.work/manifest.json", "model/config.json"]
    before = (model_folder / "config.json").read_bytes()
    for report in (*names, "link/x.ptd", "link/model/model.safetensors"):
        line = refused(
            "export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu", "--report", tmp_path / report
        )
        assert f"report='{tmp_path / report}' " in line and line.endswith("x.report.json")
    assert (model_folder / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link"}
    # A report of before may be replaced, wherever it is.
    (model_folder / "r.json").write_text('{"compiled": [], "sizes": {}}')
    check_report(model_folder / "r.json", ExportOptions(str(model_folder), tmp_path / "x.pte", "cpu"))


def test_export_options_without_an_effect(tmp_path: Path) -> None:
    line = refused("export", "tiny", "--check", "--report", tmp_path / "r.json")
    assert "is of an export, and --check makes none: leave one of the two out" in line
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cpu")
    for seed in (-5, 7):
        assert f"seed={seed} is for synthetic models, 'tiny' has its weights: leave it out" in refused(
            *command, "--seed", seed
        )
    line = refused("export", "synthetic:tiny", "-o", tmp_path / "x.pte", "--target", "cpu", "--seed", -5)
    assert "seed=-5 must be at least 0" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("bench", "model", "x.pte", "--profile"), ("bench", "kernel")])
def test_bench_pictures_that_cannot_be_written(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "must end in .png or .svg: give for example" in refused(*command, "--plot", tmp_path / "x.gif")
    (tmp_path / "x.svg").mkdir()
    assert "is a folder: give a file name" in refused(*command, "--plot", tmp_path / "x.svg")


def test_export_names_of_the_output(tmp_path: Path) -> None:
    assert "must end in .pte: give for example" in refused("export", "tiny", "-o", tmp_path / "x.bin")
    assert "must end in .pte: give a file name" in refused("export", "tiny", "-o", "")
    (tmp_path / "folder.pte").mkdir()
    assert "is a folder" in refused("export", "tiny", "-o", tmp_path / "folder.pte")
    (tmp_path / "file").write_text("")
    assert "not a writable folder" in refused("export", "tiny", "-o", tmp_path / "file" / "x.pte", "--target", "cpu")


def test_export_folders_that_are_no_models(tmp_path: Path) -> None:
    out = tmp_path / "x.pte"
    assert "is not a folder: give a folder with config.json" in refused("export", tmp_path / "none", "-o", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused("export", empty, "-o", out)
    (empty / "config.json").write_text("{}")
    assert "has no *.safetensors" in refused("export", empty, "-o", out)
    assert not out.exists()


def test_export_spoiled_models(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pte"
    config = (model_folder / "config.json").read_text()
    (model_folder / "config.json").write_text(config[: len(config) // 2])
    assert "is not a model configuration (JSONDecodeError" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "jamba"}))
    assert "model_type='jamba' in" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert "model_type='llama'" in (line := refused("export", model_folder, "-o", out))
    assert "is not a Mixture-of-Experts model (no experts in its configuration): use a model of type qwen3_moe" in line
    quantized = json.loads(config) | {"quantization_config": {"quant_method": "fp8"}}
    (model_folder / "config.json").write_text(json.dumps(quantized))
    assert "are quantized (fp8), which is not supported yet" in refused("export", model_folder, "-o", out)
    (model_folder / "config.json").write_text(config)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    line = refused("export", model_folder, "-o", out, "--target", "cpu")
    assert "model.safetensors is cut short or damaged" in line and line.endswith("download it again")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_weights_that_do_not_fit_the_configuration(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "but config.json asks for" in line and "check that config.json and weights are of the same model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_of_a_router_that_chooses_more_experts_than_there_are(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "num_experts_per_tok=99 of config.json must be between 1 and its 8 experts" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


ROPE = {"factor": 4.0, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dynamic", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}),
        ("longrope", {"rope_parameters": {**ROPE, **FACTORS, "rope_type": "longrope"}}),
        ("dynamic", {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ],
    ids=["dynamic", "longrope", "as before transformers 5"],
)
def test_export_of_positions_that_are_encoded_by_length(
    kind: str, change: dict[str, object], model_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | change))
    for how in (("-o", tmp_path / "x.pte"), ("--check",)):
        line = refused("export", model_folder, "--target", "cpu", *how, steps=("reading headers",))
        assert f"RoPE of type {kind} is not supported: its frequencies depend on the length of the text; use" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_of_a_model_for_very_short_texts(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    line = refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")
    assert "the model's max_position_embeddings=4 is less than the smallest cache, 8: use another model" in line


WITH_OTHER_VERSIONS = """
import sys
from importlib import metadata
real = metadata.version
_, package, given = sys.argv[:3]
def version(name):
    if name != package:
        return real(name)
    if given == "none":
        raise metadata.PackageNotFoundError(name)
    return given
metadata.version = version
del sys.argv[1:3]
from executorch_moe.export.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("torch", "2.10.0", "torch 2.10.0 is installed, but executorch-moe works with torch>=2.11,<2.14: pip install"),
        ("triton", "3.8.0", "triton 3.8.0 is installed, but executorch-moe works with triton>=3.6,<3.8: pip install"),
        ("executorch", "none", "executorch is not installed: pip install 'executorch>=1.5.1,<1.6'"),
        ("torchao", "0.17.0", "torchao 0.17.0 is installed, but executorch-moe works with torchao>=0.18,<0.19: pip"),
        ("transformers", "5.99.0", "transformers 5.99.0 is installed, but executorch-moe works with transformers>=5"),
        ("transformers", "none", "transformers is not installed: pip install 'executorch-moe[hf]'"),
    ],
)
def test_other_versions_are_one_line_before_anything_else(
    package: str, version: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.pte"
    command = [sys.executable, "-c", WITH_OTHER_VERSIONS, package, version, "export", "none", "-o", str(out)]
    result = subprocess.run([*command, "--target", "cpu"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith(f"error: {message}") and len(result.stderr.splitlines()) == 1
    # Its help is shown all the same.
    assert subprocess.run([*command[:-3], "--help"], capture_output=True).returncode == 0


def test_several_other_versions_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name in ("torch", "torchao") else real(name))
    line = refused("inspect", "none.pte")
    assert "torch 0.1 is installed" in line and "; torchao 0.1 is installed" in line


def test_export_without_an_output() -> None:
    assert "--out is missing: give the .pte to write, as in -o model.pte" in refused("export", "tiny")


def test_export_without_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert "has no usable tokenizer" in refused("export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu")


def test_generate_missing_and_foreign_files(tmp_path: Path) -> None:
    pte = tmp_path / "x.pte"
    assert "is not a file: give the .pte" in refused("generate", pte, "-p", "a")
    pte.write_bytes(b"not a program" * 100)
    assert "tokenizer.json is missing" in refused("generate", pte, "-p", "a")
    shutil.copy(resolve("tiny") / "tokenizer.json", tmp_path / "x.tokenizer.json")
    assert "x.pte" in refused("generate", pte, "-p", "a")


def test_generate_takes_text_only(tmp_path: Path) -> None:
    (tmp_path / "x.pte").touch()
    assert "is not valid UTF-8" in refused("generate", tmp_path / "x.pte", "-p", "a\udcff")


class OneToken:
    """Stands for a `TextGenerator` that is told to stop at once."""

    program = SimpleNamespace(runtime="stand-in", note="")
    tokenizer = None

    @classmethod
    def load(cls, *_: object, **__: object) -> OneToken:
        return cls()

    def encode(self, prompt: str) -> list[int]:
        return [1]

    def check_length(self, *_: object) -> None: ...

    def warm_up(self, *_: object) -> None: ...

    def generate(self, *_: object, **__: object) -> Generation:
        return Generation(1, [5], 0.5, 0.0, "max_new_tokens")


def test_generate_of_one_token_has_no_speed_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executorch_moe.export.generate.generator.TextGenerator", OneToken)
    monkeypatch.setattr("executorch_moe.export.generate.generator.TextStream._decode", lambda self, ids: "a" * len(ids))
    result = runner.invoke(app, ["generate", "x.pte", "-p", "a", "--max-new-tokens", "1"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "prefill 2.0 tok/s (1 tokens in 0.500 s), stopped by max_new_tokens" in result.stderr
    assert "nan" not in result.stderr


def test_a_reader_that_has_enough_ends_the_program_without_a_word() -> None:
    code = (
        "import sys\n"
        "from executorch_moe.export import cli\n"
        "@cli.app.command()\n"
        "@cli.one_line_errors\n"
        "def shout() -> None:\n"
        "    while True:\n"
        "        sys.stdout.write('a' * 1000); sys.stdout.flush()\n"
        "@cli.app.command()\n"
        "@cli.one_line_errors\n"
        "def lose_worker() -> None:\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli.app()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen([*command, "shout"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5) == b"aaaaa"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 1
    other = subprocess.run([*command, "lose-worker"], capture_output=True)  # another pipe than ours
    assert other.returncode == 2 and b"error: [Errno 32] Broken pipe" in other.stderr


@pytest.mark.slow
def test_generate_refuses_what_does_not_fit(exported: Callable[[str, str], Path]) -> None:
    pte = exported("w4a16", "cpu")
    assert "prompt='' has no tokens" in refused("generate", pte, "-p", "")
    line = refused("generate", pte, "-p", "x" * 129)
    assert "the prompt has 129 tokens but the model was exported with max_context=128" in line
    assert line.endswith("shorten the prompt, or export again with a larger --max-context, up to the model's own limit")
    assert "ask for 126 at most" in refused("generate", pte, "-p", "abc", "--max-new-tokens", 127)
    assert "temperature=-1.0" in refused("generate", pte, "-p", "abc", "--temperature", -1)
    assert "runtime 'tvm' is unknown" in refused("generate", pte, "-p", "abc", "--runtime", "tvm")
    assert "delegate" in refused("generate", pte, "-p", "abc", "--runtime", "delegate-host")
    assert "prompt_tokens='a,b' must be whole numbers" in refused("bench", "model", pte, "--prompt-tokens", "a,b")
    assert "format='xml' is unknown" in refused("bench", "model", pte, "--format", "xml")
    assert "repeats=0 must be at least 1" in refused("bench", "model", pte, "--repeats", 0)
    assert "max_context=128" in refused("bench", "model", pte, "--prompt-tokens", "100,200")
    assert "leave --profile out" in refused("bench", "model", pte, "-p", "4", "-n", "2", "-r", "1", "--profile")
    assert "of a profile: add --profile" in refused("bench", "model", pte, "--plot", "x.png")
    assert "top_p=0.0" in refused("generate", pte, "-p", "abc", "--top-p", 0)
    assert "prefill_chunk=0 must be" in refused("generate", pte, "-p", "abc", "--prefill-chunk", 0)
    assert "leave CUDA graphs off" in refused("generate", pte, "-p", "abc", "--cuda-graph")


@pytest.mark.slow
def test_generate_refuses_files_that_do_not_belong_together(
    exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    pte = exported("w4a16", "cpu")
    for suffix in (".pte", ".tokenizer.json"):
        shutil.copy(pte.with_suffix(suffix), tmp_path / f"x{suffix}")
    assert "x.ptd" in refused("generate", tmp_path / "x.pte", "-p", "a")
    tokenizer = tmp_path / "x.tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"a"', '"~"', 1).replace('"b"', '"a"', 1))
    shutil.copy(pte.with_suffix(".ptd"), tmp_path / "x.ptd")
    assert "x.tokenizer.json is damaged or does not belong to the .pte beside it" in refused(
        "generate", tmp_path / "x.pte", "-p", "a"
    )
    tokenizer.write_text(text)
    shutil.copy(exported("w4a8", "cpu").with_suffix(".ptd"), tmp_path / "x.ptd")
    assert "does not belong to" in refused("generate", tmp_path / "x.pte", "-p", "a")
    data = pte.with_suffix(".ptd").read_bytes()
    (tmp_path / "x.ptd").write_bytes(data[: len(data) // 2])
    assert "x.ptd" in refused("generate", tmp_path / "x.pte", "-p", "a")


@pytest.mark.slow
def test_generate_prints_text_to_stdout_and_the_rest_to_stderr(exported: Callable[[str, str], Path]) -> None:
    command = ["generate", str(exported("w4a16", "cpu")), "-p", "The import", "--max-new-tokens", "12"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"The import.{12}\n", result.stdout, re.DOTALL)
    assert "runtime: executorch (CPU)" in result.stderr
    assert re.search(r"prefill [\d,.]+ tok/s \(10 tokens in .*decode [\d,.]+ tok/s \(11", result.stderr, re.DOTALL)
    sampled = [runner.invoke(app, [*command, "--temperature", "0.8", "--seed", seed]).stdout for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]
    assert "seed" not in result.stderr  # nothing is drawn at temperature 0
    fresh = [runner.invoke(app, [*command, "--temperature", "0.8"]) for _ in range(2)]
    seeds = [re.search(r"--seed (\d+) gives", run.stderr) for run in fresh]
    assert seeds[0] and seeds[1] and seeds[0][1] != seeds[1][1]
    again = runner.invoke(app, [*command, "--temperature", "0.8", "--seed", seeds[0][1]])
    assert again.stdout == fresh[0].stdout


@pytest.mark.slow
def test_bench_model(exported: Callable[[str, str], Path]) -> None:
    command = ["bench", "model", str(exported("w4a16", "cpu")), "--prompt-tokens", "8,1", "--new-tokens", "4"]
    table = runner.invoke(app, [*command, "--repeats", "2"]).stdout
    assert "runtime: executorch (CPU)" in table and "picked on the device" in table
    assert "experts ours, dense none" in table and "| prefill 8 | " in table and "| decode 4 after 1 | " in table
    assert re.search(
        r"\.pte .*; \.ptd .*; expert weights .*; export .* s \(check .*\); .*peak of this run: host", table
    )
    result = json.loads(runner.invoke(app, [*command, "-r", "3", "-o", "json", "--prefill-chunk", "3"]).stdout)
    assert result["prefill_chunk"] == 3 and result["export"]["options"]["output"] == "token"
    assert result["bytes"][".ptd"] > result["bytes"]["expert weights"] > 0 and result["peak_bytes"]["host"] > 1e8
    speeds = result["speeds"]
    assert [len(speed["decode"]) for speed in speeds] == [3, 3]
    assert all(rate > 0 for speed in speeds for rate in speed["prefill"] + speed["decode"])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = runner.invoke(app, ["--debug", "generate", str(tmp_path / "none.pte"), "-p", "a"])
    assert isinstance(result.exception, FileNotFoundError)


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        torch.zeros(2).reshape(3)

    monkeypatch.setattr("executorch_moe.export.pipeline.export_model", broken)
    result = runner.invoke(app, ["export", "tiny", "-o", str(tmp_path / "x.pte"), "--target", "cpu"])
    assert isinstance(result.exception, RuntimeError)


def test_doctor_names_versions_and_runtimes() -> None:
    result = runner.invoke(app, ["doctor"], terminal_width=200)
    assert result.exit_code in (0, 1)
    for name in ("torch", "executorch", "triton", "torchao", "transformers", "GPU", "ptxas", "delegate host"):
        assert name in result.stdout


def test_doctor_says_what_to_do_about_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from executorch_moe.export import doctor

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "torchao" else real(name))
    wrong = [check for check in doctor.pins() if check.status == doctor.FAIL]
    assert [check.name for check in wrong] == ["torchao"]
    assert wrong[0].remedy == "works with torchao>=0.18,<0.19: pip install 'torchao>=0.18,<0.19'"


def test_doctor_with_packages_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is shown whatever a package of another version does."""

    def broken(*_: object) -> None:
        raise AttributeError("module has no attribute 'x'\nmore")

    from executorch_moe.backends.cuda.cross import target as cross_compile
    from executorch_moe.export import doctor

    monkeypatch.setattr(cross_compile, "check_target", broken)
    result = runner.invoke(app, ["doctor"], terminal_width=200)
    assert result.exit_code == 1 and "delegate host" in result.stdout
    (check,) = [check for check in doctor.run_checks() if check.name == "export for other GPUs"]
    assert (check.status, check.found) == (doctor.FAIL, "AttributeError: module has no attribute 'x'")
