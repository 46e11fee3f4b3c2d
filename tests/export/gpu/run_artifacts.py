"""Runs each method of artifacts once or twice in the delegate host, for a checker of memory accesses.

python -m tests.export.gpu.run_artifacts PTE...     from the root of the repository
"""

from __future__ import annotations

import sys

import torch

from executorch_moe.backends.artifact.files import open_artifact
from executorch_moe.backends.runtime.loader import load

PROMPT = 20


def main(paths: list[str]) -> None:
    for path in paths:
        program = load(path, runtime="delegate-host")
        if "decode" in program.method_names:
            program.run("prefill", torch.arange(1, PROMPT + 1)[None], torch.arange(PROMPT))
            for position in (PROMPT, PROMPT + 1):
                program.run("decode", torch.tensor([[65]]), torch.tensor([position]))
        else:  # artifacts of tests/export/families.py return the logits of a text
            (text,) = open_artifact(path)[0].inputs("forward")
            for length in (2, 11) if text.dynamic else (text.sizes[1],):
                program.run("forward", torch.arange(1, length + 1)[None])
        torch.cuda.synchronize()
        print(f"ran {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
