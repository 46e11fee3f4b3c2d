"""A minimal runner to copy: generates text with an exported model.

    executorch-moe export tiny -o demo/tiny.pte
    python examples/runner.py demo/tiny.pte "The import statement" [MAX_NEW_TOKENS]

It takes artifacts of `export --output token`, the default. `executorch-moe generate` adds checks, options and times.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import executorch_moe as moe


def main(pte: str, prompt: str, max_new_tokens: str = "100") -> None:
    program = moe.load(pte)  # and the .ptd of the same name
    tokenizer = Tokenizer.from_file(str(Path(pte).with_suffix(".tokenizer.json")))
    max_context = program.constant("get_max_context_len")
    eos_ids = program.constant("get_eos_ids")
    # temperature, top-p and seed: the methods sample the next token; temperature 0 takes the likeliest.
    sampling = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0])
    print(f"runtime: {program.runtime}", file=sys.stderr)

    ids = tokenizer.encode(prompt).ids
    if not 0 < len(ids) <= max_context:
        sys.exit(f"the prompt has {len(ids)} tokens: give 1 to {max_context}")
    end = min(len(ids) + int(max_new_tokens), max_context + 1)  # the last new token needs no position in the cache
    cached = 0
    while len(ids) < end:
        # The whole prompt first, then token by token. `prefill` takes two or more tokens, `decode` one.
        method = "prefill" if len(ids) - cached > 1 else "decode"
        tokens = torch.tensor([ids[cached:]], device=program.device)  # int64 [1, T]
        positions = torch.arange(cached, len(ids), device=program.device)  # int64 [T]
        (token,) = program.run(method, tokens, positions, *sampling)  # int64 [1, 1]
        cached = len(ids)
        ids.append(int(token))
        if ids[-1] in eos_ids:
            break
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
