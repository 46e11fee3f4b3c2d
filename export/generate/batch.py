"""Several texts at once: requests join and leave between steps (continuous batching).

Each text has a slot of the KV cache. A step computes one token of every running text in one call of `decode_batch`. A
text that is alone takes `decode`, which is faster, if it has slot 0, and new texts get the lowest free slot.

On a GPU the next step starts before the host has read the tokens of the last one, so that the GPU does not wait. What
such a step computes for a text that has ended meanwhile is dropped; it wrote nothing but the key and value of the
text's last token, which nothing reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from executorch_moe.backends.runtime.loader import BATCH_METHOD
from executorch_moe.export.models.sampling import Sampler

from .generator import TextGenerator


@dataclass(eq=False)
class Sequence:
    """A text that is generated, or waits for a slot.

    Attributes:
        prompt_ids: its prompt. limit: number of tokens to generate. sampler: settings.
        on_token: called with each new token; may return True to stop. ignore_eos: continue after an end-of-text token.
        tokens: new token ids so far.
        slot: its part of the cache; None before it has one.
        computed: tokens of the prompt whose keys and values are in the cache.
        stopped_by: "end of text", "max_new_tokens", "a stop text" or "canceled"; empty before the end.
    """

    prompt_ids: list[int]
    limit: int
    sampler: Sampler = field(default_factory=Sampler)
    on_token: Callable[[int], bool | None] | None = None
    ignore_eos: bool = False
    tokens: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    stopped_by: str = ""

    @property
    def resident(self) -> list[int]:
        """Tokens whose keys and values are in the slot: the last new token was not an input yet."""
        if self.computed < len(self.prompt_ids):
            return self.prompt_ids[: self.computed]
        return self.prompt_ids + self.tokens[:-1]

    @property
    def position(self) -> int:
        """Position of the last token, the input of the next step."""
        return len(self.prompt_ids) + len(self.tokens) - 1


class BatchGenerator:
    """Generates several texts with an artifact of `export --max-batch`.

    Attributes:
        running: the texts that take part in a step. waiting: those without a slot, in order.
    """

    def __init__(self, generator: TextGenerator, *, slots_given: bool = False, ahead: bool | None = None) -> None:
        """
        Args:
            generator: the loaded artifact; nothing else may use it meanwhile.
            slots_given: the caller of `add` gives each text a slot, and knows which of them are free.
            ahead: start a step before the tokens of the last one are read; None: on a GPU. It has no effect if tokens
                are picked on the host, or with recurrent layers, whose state cannot go back a token.

        Raises:
            ValueError: the artifact was exported for one sequence.
        """
        if generator.max_batch < 2:
            raise ValueError("the artifact computes one sequence at a time: export it with --max-batch 8, for example")
        self.generator = generator
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._filling: Sequence | None = None
        self._slots_given = slots_given
        self._free = set() if slots_given else set(range(generator.max_batch))
        self._rows: tuple[Tensor, ...] | None = None  # inputs of the next step; None after texts joined or left
        self._device = generator.program.device
        wanted = self._device.type == "cuda" if ahead is None else ahead
        self._ahead = wanted and generator.can_rewind and generator.output != "logits"
        self._started: tuple[list[Sequence], Tensor] | None = None  # a step whose tokens were not read: texts, tokens

    def add(
        self,
        prompt_ids: list[int],
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        on_token: Callable[[int], bool | None] | None = None,
        *,
        ignore_eos: bool = False,
        slot: int | None = None,
        cached: int = 0,
    ) -> Sequence:
        """Puts a text in line; arguments as for `TextGenerator.generate`.

        Args:
            slot: with `slots_given`, a slot that no other text has.
            cached: number of the prompt's first tokens that are in that slot, less than all.

        Raises:
            ValueError: an empty prompt, more tokens than fit into a slot, or settings that the artifact does not have.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: pass at least one token")
        sampler = sampler or Sampler()
        self.generator.check_sampler(sampler)
        limit = self.generator.check_length(len(prompt_ids), max_new_tokens)
        if (slot is None) == self._slots_given or not 0 <= cached < len(prompt_ids):
            raise ValueError(f"slot={slot} and cached={cached} are for slots_given=True: pass both there, nowhere else")
        sequence = Sequence(
            list(prompt_ids), limit, sampler, on_token, ignore_eos, slot=slot, computed=0 if slot is None else cached
        )
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a text before the next step; does nothing if it has ended."""
        if not sequence.stopped_by:
            self._end(sequence, "canceled")

    def run(self) -> None:
        """Steps until no text is left."""
        while self.step():
            pass

    def step(self) -> bool:
        """One call of `prefill` for the next waiting text, if a slot is free, and one token of every running text.

        Returns:
            False if there was nothing to do.
        """
        busy = bool(self.running)
        filled = self.fill()
        if self.running and busy:
            self._decode()
        return busy or filled

    def fill(self) -> bool:
        """One call of `prefill` for the next waiting text; the last one of a text gives its first token.

        Returns:
            False if no text waits, or no slot is free.
        """
        if self._filling is None:
            if not self.waiting or not (self._free or self._slots_given):
                return False
            self._filling = self.waiting.popleft()
            if not self._slots_given:
                self._filling.slot = min(self._free)
                self._free.remove(self._filling.slot)
        sequence, start = self._filling, self._filling.computed
        assert sequence.slot is not None
        chunk = self.generator.prefill_chunk or len(sequence.prompt_ids)
        ids = sequence.prompt_ids[start : start + chunk]
        positions = torch.arange(start, start + len(ids), device=self._device)
        settings = sequence.sampler.inputs(self._device) if self.generator.output == "token" else ()
        (out,) = self.generator.program.run(
            "prefill", torch.tensor([ids], device=self._device), positions, self._numbers([sequence.slot]), *settings
        )
        sequence.computed += len(ids)
        if sequence.computed == len(sequence.prompt_ids):
            self._filling = None
            self.running.append(sequence)
            self._rows = None
            self._take(sequence, out[0])
        return True

    def _decode(self) -> None:
        """One token of every running text."""
        if self._started is None or not any(sequence in self.running for sequence in self._started[0]):
            self._started = self._start(list(self.running))
        texts, out = self._started
        self._started = None
        # No text may end by its limit, because the next position may be outside the cache.
        if self._ahead and self._rows is not None and all(len(text.tokens) + 1 < text.limit for text in texts):
            self._started = self._start(texts)
        host = out.cpu()
        for sequence in texts:
            if not sequence.stopped_by:
                assert sequence.slot is not None
                self._take(sequence, host[sequence.slot])

    def _start(self, texts: list[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Starts a step; returns the texts and their tokens or logits, which row i has for slot i."""
        inputs = self._rows or self._inputs(texts)
        tokens, positions, _, *settings = inputs
        alone = len(texts) == 1 and texts[0].slot == 0
        if alone:
            one = (tokens[:1], positions[:1], *(setting[:1] for setting in settings))
            (out,) = self.generator.program.run("decode", *one)
        else:
            (out,) = self.generator.program.run(BATCH_METHOD, *inputs)
        if self.generator.output == "logits":
            self._rows = None
        else:  # the tokens stay where they are, as inputs of the next step
            chosen = torch.cat([out, tokens[1:]]) if alone else out
            self._rows = (chosen, positions + (positions >= 0), *inputs[2:])
        return texts, out

    def _inputs(self, running: list[Sequence]) -> tuple[Tensor, ...]:
        """Inputs of `decode_batch`: row i is slot i, and rows without a text are empty."""
        rows = self.generator.max_batch
        tokens, positions, settings = [0] * rows, [-1] * rows, [Sampler()] * rows
        for sequence in running:
            assert sequence.slot is not None
            tokens[sequence.slot], positions[sequence.slot] = sequence.tokens[-1], sequence.position
            settings[sequence.slot] = sequence.sampler
        inputs = (self._numbers(tokens)[:, None], self._numbers(positions), self._numbers(list(range(rows))))
        if self.generator.output != "token":
            return inputs
        cpu = torch.device("cpu")
        joined = zip(*(sampler.inputs(cpu) for sampler in settings), strict=True)
        return (*inputs, *(torch.cat(parts).to(self._device) for parts in joined))

    def _numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _take(self, sequence: Sequence, row: Tensor) -> None:
        """Appends a token, or samples one from logits [V], and ends the text if it is the last one."""
        if self.generator.output == "logits":
            token = sequence.sampler(row[None].cpu(), sequence.position + 1)
        else:
            token = int(row)
        sequence.tokens.append(token)
        if sequence.on_token is not None and sequence.on_token(token):
            self._end(sequence, "a stop text")
        elif token in self.generator.eos_ids and not sequence.ignore_eos:
            self._end(sequence, "end of text")
        elif len(sequence.tokens) >= sequence.limit:
            self._end(sequence, "max_new_tokens")

    def _end(self, sequence: Sequence, why: str) -> None:
        sequence.stopped_by = why
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._rows = None
        if sequence is self._filling:
            self._filling = None
        if sequence.slot is not None and not self._slots_given:
            self._free.add(sequence.slot)
