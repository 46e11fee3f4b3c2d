"""Generates text from an exported model in a few lines: a script to copy and change.

    python -m executorch_moe.examples.runner demo/tiny.pte "The import statement" [MAX_NEW_TOKENS]

`executorch-moe generate` does the same with checks, options and times. For artifacts of `export --output token`.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from executorch_moe.backends.runtime.loader import load


def main(pte: str, prompt: str, max_new_tokens: str = "100") -> None:
    program = load(pte)  # the .ptd of the same name comes with it
    tokenizer = Tokenizer.from_file(str(Path(pte).with_suffix(".tokenizer.json")))
    max_context = program.constant("get_max_context_len")
    eos_ids = program.constant("get_eos_ids")
    # The methods pick the next token themselves: temperature 0 takes the likeliest; top-p; seed.
    sampling = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0])
    print(f"runtime: {program.runtime}", file=sys.stderr)

    ids = tokenizer.encode(prompt).ids
    if not 0 < len(ids) <= max_context:
        sys.exit(f"the prompt has {len(ids)} tokens: give 1 to {max_context}")
    # The last new token needs no place in the cache: it is not fed back.
    end = min(len(ids) + int(max_new_tokens), max_context + 1)
    fed = 0
    while len(ids) < end:
        # First the whole prompt, then one token at a time; `prefill` takes 2 tokens and more, `decode` takes 1.
        tokens = torch.tensor([ids[fed:]], device=program.device)
        positions = torch.arange(fed, len(ids), device=program.device)
        (token,) = program.run("prefill" if len(ids) - fed > 1 else "decode", tokens, positions, *sampling)
        fed = len(ids)
        ids.append(int(token))
        if ids[-1] in eos_ids:
            break
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
