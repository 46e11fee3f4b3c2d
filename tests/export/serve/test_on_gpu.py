"""The server with the tiny model on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from executorch_moe.export.generate.generator import TextGenerator

from .conftest import running

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.gpu
NEW_TOKENS = 16


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_sessions_take_turns_on_one_state(cuda_graph: bool, exported: Callable[..., Path]) -> None:
    """A session that lost its state computes its prompt again, and gets the text of our own runner."""
    from executorch_moe.export.serve.app import ServeOptions, serving

    pte = exported("w4a16", "cuda", "fp32")
    generator = TextGenerator.load(pte, "delegate-host")
    options = ServeOptions(pte, "tiny", sessions=2, runtime="delegate-host", cuda_graph=cuda_graph)
    with serving(options) as app, running(app) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
        for prompt in ("The import statement", "The import", "class Point:"):
            tokens = generator.generate(generator.encode(prompt), NEW_TOKENS).tokens
            for name in ("a", "b", "a"):
                answer = client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=NEW_TOKENS,
                    extra_body={"session_id": name},
                )
                assert answer.choices[0].message.content == generator.tokenizer.decode(tokens)
