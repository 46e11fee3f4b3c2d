"""`export`: its options and files, and that a user's mistake gives one line and exit status 2."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from executorch_moe.export.cli.app import app
from executorch_moe.export.options import ExportOptions, Target
from executorch_moe.export.report.metadata import check_report

from .refusals import refused, runner


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "int4"), "--scheme 'int4' is unknown: use one of bf16, w4a16, w4a8"),
        (("--algorithm", "gptq"), "--algorithm 'gptq' is unknown: use one of minmax, hqq"),
        (("--target", "tpu"), "--target 'tpu' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "sm_90,sm_70"), "--target 'sm_90,sm_70' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "sm_90,cpu"), "--target 'sm_90,cpu' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--target", "h100,h200"), "targets 'h100' and 'h200' are both sm_90, and an artifact holds code for an "),
        (("--target", "sm_70"), "--target 'sm_70' is unknown: use one of cuda, cpu, auto, sm_80, "),
        (("--group-size", "48"), "--group-size 48"),
        (("--group-size", "256"), "must be a multiple of --group-size 256"),
        (("--max-context", "4096"), "--max-context 4096 must be between 8 and the model's max_position_embeddings=512"),
        (("--max-context", "0"), "--max-context 0 must be between"),
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
    assert "--target 'cuda' needs a GPU" in line and "--target 'sm_90'" in line and "use --target 'cpu'" in line
    assert list(tmp_path.iterdir()) == []


def test_export_for_another_gpu_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused("export", "tiny", "-o", tmp_path / "x.pte", "--target", "h200")
    assert "cannot export for h200: the C++ compiler 'no-such-compiler' is not found: install g++" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["packing", "writing"])
def test_an_export_to_a_full_disk_names_the_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python nor safetensors name it. The work folder, which stays, is named after every error."""
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
    assert "x.work:thesamecommandcontinuesfromthere" in "".join(result.stderr.split())  # however it is wrapped
    assert [path.name for path in tmp_path.iterdir()] == ["x.work"]


def test_export_reports_that_cannot_be_written(tmp_path: Path) -> None:
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cpu", "--report")
    assert "is a folder: give a file name" in refused(*command, tmp_path)
    (tmp_path / "file").write_text("")
    line = refused(*command, tmp_path / "file" / "r.json")
    assert "--report " in line and "is not a writable folder: choose another" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_reports_over_files_of_the_export(model_folder: Path, tmp_path: Path) -> None:
    """Nothing is written; files of the model and of an earlier export do not change."""
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["x.pte", "x.ptd", "x.tokenizer.json", "x.export.json", "x.work/manifest.json", "model/config.json"]
    before = (model_folder / "config.json").read_bytes()
    for report in (*names, "link/x.ptd", "link/model/model.safetensors"):
        line = refused(
            "export", model_folder, "-o", tmp_path / "x.pte", "--target", "cpu", "--report", tmp_path / report
        )
        assert f"--report '{tmp_path / report}' " in line and line.endswith("x.report.json")
    assert (model_folder / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link"}
    # A report of an earlier export may be replaced in any folder.
    (model_folder / "r.json").write_text('{"compiled": [], "sizes": {}}')
    check_report(model_folder / "r.json", ExportOptions(str(model_folder), tmp_path / "x.pte", target=Target("cpu")))


def test_export_options_without_an_effect(tmp_path: Path) -> None:
    line = refused("export", "tiny", "--check", "--report", tmp_path / "r.json")
    assert "belongs to an export, and --check makes none: leave one of them out" in line
    command = ("export", "tiny", "-o", tmp_path / "x.pte", "--target", "cpu")
    for seed in (-5, 7):
        assert f"--seed {seed} is for synthetic models, 'tiny' has its weights: leave it out" in refused(
            *command, "--seed", seed
        )
    line = refused("export", "synthetic:tiny", "-o", tmp_path / "x.pte", "--target", "cpu", "--seed", -5)
    assert "--seed -5 must be at least 0" in line
    assert list(tmp_path.iterdir()) == []


def test_export_names_of_the_output(tmp_path: Path) -> None:
    assert "must end in .pte: give for example" in refused("export", "tiny", "-o", tmp_path / "x.bin")
    assert "must end in .pte: give a file name" in refused("export", "tiny", "-o", "")
    (tmp_path / "folder.pte").mkdir()
    assert "is a folder" in refused("export", "tiny", "-o", tmp_path / "folder.pte")
    (tmp_path / "file").write_text("")
    assert "not a writable folder" in refused("export", "tiny", "-o", tmp_path / "file" / "x.pte", "--target", "cpu")


def test_export_without_an_output() -> None:
    assert "--out is missing: give the .pte to write, as in -o model.pte" in refused("export", "tiny")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that accepts no files")
def test_export_to_folders_that_accept_no_files(tmp_path: Path) -> None:
    command = ("export", "tiny", "--target", "cpu")
    line = refused(*command, "-o", "/proc/x.pte")
    assert line.startswith("error: --out '/proc/x.pte' cannot be written, ") and ": choose another" in line
    line = refused(*command, "-o", tmp_path / "x.pte", "--report", "/proc/r.json")
    assert line.startswith("error: --report '/proc/r.json' cannot be written, ")
    assert list(tmp_path.iterdir()) == []
