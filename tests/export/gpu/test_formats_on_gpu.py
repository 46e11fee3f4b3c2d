"""On a GPU: artifacts of quantized checkpoints in the delegate host, against transformers on the dequantized weights.

Everything but the experts is in fp32; the experts have bf16 activations. Linear layers keep their codes where the
format has some.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from executorch_moe.backends.runtime.loader import load
from executorch_moe.export.options import Context, Dense, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model

from ..checkpoint.formats.stored import Saved, save_gpt_oss, tokenizer_file
from ..checkpoint.formats.test_awq import save_awq
from ..checkpoint.formats.test_exports import CONTEXT, compare
from ..checkpoint.formats.test_fp8 import save_defined
from ..checkpoint.formats.test_gptq import save_gptq

pytestmark = pytest.mark.gpu


def packed_integers(folder: Path) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from ..checkpoint.formats.test_compressed_tensors import save_packed

    return save_packed(folder, 64)


def nvfp4(folder: Path) -> Saved:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from ..checkpoint.formats.test_fp4 import save_fp4

    return save_fp4(folder, "nvfp4-pack-quantized")


FORMATS: dict[str, tuple[Callable[[Path], Saved], str, str]] = {
    "gptq": (lambda folder: save_gptq(folder, 64), "w4a16", "int4"),
    "awq": (lambda folder: save_awq(folder, 128), "w4a16", "int4"),
    "compressed-tensors": (packed_integers, "w4a16", "none"),
    "fp8": (lambda folder: save_defined(folder, "fp8"), "bf16", "none"),
    "nvfp4": (nvfp4, "bf16", "none"),
    "mxfp4": (save_gpt_oss, "mxfp4", "none"),
}
"""Name -> how a checkpoint is saved, the scheme that holds its experts, and the storage of linear layers."""


@pytest.mark.parametrize("name", FORMATS)
def test_logits_and_tokens(name: str, tmp_path: Path) -> None:
    save, scheme, dense = FORMATS[name]
    saved = save(tmp_path / "model")
    options = ExportOptions(
        str(tmp_path / "model"),
        tmp_path / f"{name}.pte",
        experts=Experts(scheme),
        dense=Dense(dense, lm_head="none"),
        target=Target("cuda", "fp32"),
        context=Context(CONTEXT, "logits"),
    )
    export_model(options)
    program = load(options.pte, runtime="delegate-host")
    compare(lambda method, *given: program.run(method, *given)[0].cpu(), saved)


def test_a_gguf_file(tmp_path: Path) -> None:
    """In a folder with configuration and tokenizer, which needs no new transformers."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    from ..checkpoint.formats.gguf_files import big_model, only, write

    folder = tmp_path / "model"
    folder.mkdir()
    written = write(folder / "model.gguf", big_model(), only("Q4_K"))
    written.reference.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file().read_bytes())
    options = ExportOptions(
        str(folder),
        tmp_path / "gguf.pte",
        dense=Dense("int4", lm_head="none"),
        target=Target("cuda", "fp32"),
        context=Context(CONTEXT, "logits"),
    )
    export_model(options)
    program = load(options.pte, runtime="delegate-host")
    saved = Saved(tmp_path, written.reference, {})
    compare(lambda method, *given: program.run(method, *given)[0].cpu(), saved)
