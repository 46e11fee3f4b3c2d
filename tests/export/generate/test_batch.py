"""Several texts at once give the tokens of each text alone, however they join and leave."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executorch_moe.backends.runtime.loader import check_rows
from executorch_moe.export.generate.batch import BatchGenerator
from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.models.batch.methods import BatchedLM
from executorch_moe.export.models.sampling import Sampler
from executorch_moe.export.options import Context, Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model

from ..conftest import MadeOnce
from ..families import RECURRENT, by_name
from ..recurrent_checkpoints import TWO_LAYERS, save_recurrent

CONTEXT, SLOTS = 32, 3
CPU = torch.device("cpu")
PROMPTS = [[5, 9, 33], [7], [12, 80, 3, 41, 22, 5, 8, 90, 2, 11], [3, 3], [60, 1, 7, 7, 7]]
LENGTHS = [9, 14, 4, 11, 6]
SAMPLERS = [Sampler(), Sampler(1.0, 3, 0.9), Sampler(0.7, 3), Sampler(1.5, 1 << 40), Sampler()]


class EagerProgram:
    """A `BatchedLM` as a loaded program."""

    runtime, device, note = "eager", torch.device("cpu"), ""
    method_names = ("decode", "decode_batch", "prefill")

    def __init__(self, output: str, family: Any = None) -> None:
        self.lm = BatchedLM((family or by_name("qwen3_moe")).model("batched_mm"), CONTEXT, SLOTS, output)
        self.calls: list[str] = []
        self.values = {
            "get_method_output": output, "get_max_context_len": CONTEXT, "get_vocab_size": 96, "get_max_batch": SLOTS,
            "get_eos_ids": [95],
        }  # fmt: skip

    @property
    def constant_names(self) -> list[str]:
        return sorted(self.values)

    def constant(self, name: str) -> Any:
        return self.values[name]

    @torch.no_grad()
    def run(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append(method)
        if method == "decode_batch":
            check_rows(inputs[1], inputs[2], CONTEXT)
        return [getattr(self.lm, method)(*inputs)]

    def reset(self) -> None:
        self.lm.reset()


def generator(output: str, chunk: int | None = None, family: Any = None) -> TextGenerator:
    return TextGenerator(EagerProgram(output, family), SimpleNamespace(), chunk)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "chunk", "family"),
    [
        ("token", None, None),
        ("token", 4, None),
        ("greedy", None, None),
        ("logits", 2, None),
        ("token", 3, RECURRENT[0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("ahead", [False, True])
def test_texts_at_once_are_as_alone(output: str, chunk: int | None, family: Any, ahead: bool) -> None:
    """Recurrent layers too, whose state of a slot is left alone while other rows are decoded."""
    samplers = [Sampler()] * 5 if output == "greedy" else SAMPLERS
    one = generator(output, family=family)
    alone = [
        one.generate(ids, length, sampler, ignore_eos=True).tokens
        for ids, length, sampler in zip(PROMPTS, LENGTHS, samplers, strict=True)
    ]
    batch = BatchGenerator(generator(output, chunk, family), ahead=ahead)
    added = []
    for ids, length, sampler in zip(PROMPTS, LENGTHS, samplers, strict=True):  # more texts than slots
        added.append(batch.add(ids, length, sampler, ignore_eos=True))
        batch.step()
    assert len(batch.running) == SLOTS or batch.waiting
    batch.run()
    assert [sequence.tokens for sequence in added] == alone
    assert {sequence.stopped_by for sequence in added} == {"max_new_tokens"}
    assert not batch.running and not batch.waiting


def test_a_text_alone_takes_decode() -> None:
    batch = BatchGenerator(generator("token"))
    batch.add(PROMPTS[0], 5)
    batch.run()
    assert batch.generator.program.calls == ["prefill", *["decode"] * 4]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ahead", [False, True])
def test_texts_end_by_themselves(ahead: bool) -> None:
    heard: list[int] = []
    batch = BatchGenerator(generator("greedy"), ahead=ahead)
    every = batch.add(PROMPTS[0], 8)
    first = every.tokens
    stopped = batch.add(PROMPTS[2], 8, on_token=lambda token: heard.append(token) or len(heard) == 3)
    canceled, waits = batch.add(PROMPTS[3], 8), batch.add(PROMPTS[1], 8)
    for _ in range(3):
        batch.step()
    assert waits in batch.waiting
    batch.cancel(canceled)
    batch.run()
    assert (stopped.stopped_by, stopped.tokens, canceled.stopped_by) == ("a stop text", heard, "canceled")
    assert len(first) == 8 and len(canceled.tokens) < 8 and len(waits.tokens) == 8
    batch.generator.eos_ids = frozenset([first[3]])
    again = batch.add(PROMPTS[0], 8)
    batch.run()
    assert again.stopped_by == "end of text" and again.tokens == first[: first.index(first[3]) + 1]


def test_steps_start_before_tokens_are_read() -> None:
    """With `ahead`, the call of a step comes before the tokens of the last one; none is in vain at a limit."""
    batch = BatchGenerator(generator("greedy"), ahead=True)
    calls = batch.generator.program.calls  # type: ignore[attr-defined]
    known: list[int] = []
    text = batch.add(PROMPTS[0], 6, on_token=lambda token: known.append(len(calls)), ignore_eos=True)
    batch.run()
    assert calls == ["prefill", *["decode"] * 5] and len(text.tokens) == 6
    assert known == [1, 3, 4, 5, 6, 6]


def test_what_does_not_fit_is_refused() -> None:
    batch = BatchGenerator(generator("greedy"))
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        batch.add([])
    with pytest.raises(ValueError, match="max_new_tokens=40 after a prompt of 3 tokens do not fit"):
        batch.add(PROMPTS[0], 40)
    with pytest.raises(ValueError, match=r"temperature=1\.0 does not apply to this artifact"):
        batch.add(PROMPTS[0], 4, Sampler(1.0))
    plain = generator("greedy")
    plain.max_batch = 1
    with pytest.raises(ValueError, match="the artifact computes one sequence at a time: export it with --max-batch"):
        BatchGenerator(plain)


@pytest.mark.parametrize(
    ("positions", "slots", "message"),
    [
        ([32, -1, 0], [0, 1, 2], "method 'decode_batch' got position 32, but its cache has positions 0 to 31"),
        ([3, -1, 0], [1, 1, 1], r"got slots \[1, 1, 1\], expected different ones from 0 to 2"),
        ([3, -1, -1], [0, 1, 3], r"got slots \[0, 1, 3\], expected different ones from 0 to 2"),
    ],
)
def test_rows_that_share_a_slot_are_refused(positions: list[int], slots: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rows(torch.tensor(positions), torch.tensor(slots), CONTEXT)


def check_artifact(pte: Path, prompts: list[list[int]] | None = None) -> None:
    """Texts at once against the same artifact, one after the other."""
    loaded = TextGenerator.load(pte)
    texts = ("The import statement", "x", "class Point:\n    def __init__(self")
    prompts = prompts or [loaded.encode(text) for text in texts]
    settings = list(itertools.product(prompts, [Sampler(), Sampler(0.8, 5, 0.9)]))
    alone = [loaded.generate(ids, 16, sampler, ignore_eos=True).tokens for ids, sampler in settings]
    loaded.program.reset()
    batch = BatchGenerator(loaded)
    added = [batch.add(ids, 16, sampler, ignore_eos=True) for ids, sampler in settings]
    batch.run()
    assert [sequence.tokens for sequence in added] == alone


def batched_artifact(made_once: MadeOnce, target: str, dtype: str) -> Path:
    def make(folder: Path) -> None:
        export_model(
            ExportOptions(
                "tiny", folder / "tiny.pte", experts=Experts("w4a16", 32), target=Target(target, dtype),
                context=Context(64, max_batch=4),
            )
        )  # fmt: skip

    return made_once(f"tiny-batch-{target}-{dtype}", make) / "tiny.pte"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("executorch_runtime")
def test_an_artifact_for_the_cpu(made_once: MadeOnce) -> None:
    check_artifact(batched_artifact(made_once, "cpu", "auto"))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("executorch_runtime")
def test_an_artifact_with_recurrent_layers_for_the_cpu(tmp_path: Path) -> None:
    save_recurrent("qwen3_5_moe_text", tmp_path / "model", **TWO_LAYERS)
    pte = tmp_path / "out.pte"
    context = Context(64, max_batch=3)
    export_model(ExportOptions(str(tmp_path / "model"), pte, target=Target("cpu"), context=context))
    check_artifact(pte, [[5, 9, 33], [7], [12, 80, 3, 41, 22, 5, 8, 90, 2, 11]])
    program = TextGenerator.load(pte).program
    assert program.constant("has_recurrent_state") is True and program.constant("get_max_batch") == 3
    with pytest.raises(ValueError, match="method 'prefill' got positions 4 to 4, expected 0 and the following ones"):
        program.run("prefill", torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1]), *Sampler().inputs(CPU))


@pytest.mark.gpu
def test_an_artifact_for_the_gpu(made_once: MadeOnce) -> None:
    """bf16: a near tie may fall either way, so the texts need only begin alike."""
    pte = batched_artifact(made_once, "cuda", "bf16")
    for cuda_graph in (False, True):
        loaded = TextGenerator.load(pte, "delegate-host", cuda_graph=cuda_graph)
        prompts = [loaded.encode(text) for text in ("The import statement", "x", "class Point:", "def f(a, b):")]
        alone = [loaded.generate(ids, 24, ignore_eos=True).tokens for ids in prompts]
        for _ in range(2):  # the second time as replays
            batch = BatchGenerator(loaded)
            added = [batch.add(ids, 24, ignore_eos=True) for ids in prompts]
            batch.run()
            same = [
                sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(s.tokens, t, strict=True)))
                for s, t in zip(added, alone, strict=True)
            ]
            assert sum(same) > 48 and min(same) > 1, same
