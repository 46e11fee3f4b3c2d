"""An export for the CPU runs in ExecuTorch's own `TextLLMRunner`, with the tokens of our runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.options import Context, ExportOptions, Target
from executorch_moe.export.report.metadata import constant_methods

pytest.importorskip("executorch.extension.llm.runner")

NEW_TOKENS = 24
PROMPTS = ("The import statement", "class Point:\n    def __init__(self", "x")  # the last has one token
RUN = """
import json, sys
from pathlib import Path
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

pte = Path(sys.argv[1])
runner = TextLLMRunner(str(pte), str(pte.with_suffix(".tokenizer.json")), str(pte.with_suffix(".ptd")))
for prompt in json.loads(sys.argv[2]):
    texts = []
    runner.reset()
    config = GenerationConfig(echo=False, max_new_tokens=int(sys.argv[3]), temperature=0.0)
    runner.generate(prompt, config, texts.append)
    print("\\nTEXT " + json.dumps("".join(texts)))
"""


def stock(pte: Path) -> subprocess.CompletedProcess[str]:
    """Runs TextLLMRunner in a process of its own: it may abort."""
    command = [sys.executable, "-c", RUN, str(pte), json.dumps(PROMPTS), str(NEW_TOKENS)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.usefixtures("executorch_runtime")
def test_stock_runner_gives_our_tokens(exported: Callable[..., Path]) -> None:
    """The default export; the last prompt has one token, which this runner gives to its prefill."""
    pte = exported("w4a16", "cpu")
    ran = stock(pte)
    assert ran.returncode == 0, ran.stderr
    texts = [json.loads(line.removeprefix("TEXT ")) for line in ran.stdout.splitlines() if line.startswith("TEXT ")]
    generator = TextGenerator.load(pte)
    ours = [generator.generate(generator.encode(p), NEW_TOKENS, ignore_eos=True).tokens for p in PROMPTS]
    assert texts == [generator.tokenizer.decode(tokens) for tokens in ours]


@pytest.mark.slow
def test_stock_runner_refuses_a_program_without_logits(exported: Callable[..., Path], tmp_path: Path) -> None:
    """CUDA programs that return tokens lack `get_max_seq_len`; here it is renamed in a program for the CPU."""
    pte = tmp_path / "token.pte"
    program = exported("w4a16", "cpu").read_bytes()
    assert program.count(b"get_max_seq_len") == 1
    pte.write_bytes(program.replace(b"get_max_seq_len", b"get_max_seq_xxx"))
    for suffix in (".ptd", ".tokenizer.json"):
        shutil.copy(exported("w4a16", "cpu").with_suffix(suffix), pte.with_suffix(suffix))
    ran = stock(pte)
    assert ran.returncode == 1 and "RuntimeError: Failed to create text llm runner" in ran.stderr
    assert "Required metadata method get_max_seq_len not found" in ran.stdout + ran.stderr


class Config:
    vocab_size, num_hidden_layers, max_position_embeddings = 264, 2, 512
    eos_token_id, bos_token_id = 257, 256
    layer_types: tuple[str, ...] = ("full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("target", "output", "accepted"),
    [("cpu", "token", True), ("cpu", "greedy", True), ("sm_90", "logits", True), ("sm_90", "token", False)],
)
def test_which_programs_stock_runners_accept(target: str, output: str, accepted: bool) -> None:
    options = ExportOptions("tiny", target=Target(target), context=Context(64, output))
    assert ("get_max_seq_len" in constant_methods(options, Config, 64, "{}")) is accepted
