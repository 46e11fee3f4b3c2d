"""`--output engine`: the methods and constants that ExecuTorch's example qwen3_5_moe reads (`Qwen35MoEEngine`).

The checks here are those of its qwen35_moe_engine.cpp: inputs, the token in fp32, and the names of mutable buffers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

from executorch_moe.backends.artifact.ptd import PtdFile
from executorch_moe.backends.artifact.pte import PteFile
from executorch_moe.backends.artifact.weight_metadata import parse_delegate
from executorch_moe.backends.cuda.cross import host_toolchain
from executorch_moe.export.generate.generator import TextGenerator
from executorch_moe.export.models.causal_lm import CausalLM, EngineLM, export_methods
from executorch_moe.export.models.sampling import Sampler
from executorch_moe.export.options import Context, ExportOptions, Target
from executorch_moe.export.pipeline import export_model
from executorch_moe.export.report.metadata import cache_buffers, constant_methods

from ..conftest import MAX_CONTEXT, eager_greedy, eager_model
from ..families import RECURRENT

TEXT = list(b"The import statement")
COLD = torch.tensor([1e-6])
"""What the engine gives for temperature 0."""
NEW_TOKENS = 12


def run_as_the_engine(programs: dict[str, ExportedProgram], prompt: list[int], count: int) -> list[int]:
    """Session::prefill_tokens and decode_one: the whole prompt at once, then each token at its position."""
    methods = {name: program.module() for name, program in programs.items()}
    ids, tokens = list(prompt), []
    for position in (0, *range(len(prompt), len(prompt) + count - 1)):
        text = torch.tensor([ids[position:]])
        method = "prefill" if text.shape[1] >= 2 else "decode"
        with torch.no_grad():
            token = methods[method](text, torch.arange(position, len(ids)), COLD)
        assert (token.dtype, token.shape) == (torch.float32, (1, 1))
        tokens.append(round(token.item()))
        ids.append(tokens[-1])
    return tokens


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return eager_model("w4a16", "cpu")


@pytest.fixture(scope="module")
def programs(model: CausalLM) -> dict[str, ExportedProgram]:
    return export_methods(EngineLM(model.model, MAX_CONTEXT))


def test_the_methods_give_our_tokens(model: CausalLM, programs: dict[str, ExportedProgram]) -> None:
    assert programs.keys() == {"prefill", "decode"}
    for name, program in programs.items():
        given = program.graph_signature.user_inputs
        first, second, temperature = (node.meta["val"] for node in program.graph.nodes if node.name in given)
        assert (first.dtype, second.dtype, temperature.dtype) == (torch.int64, torch.int64, torch.float32)
        assert (first.shape[0], temperature.shape) == (1, (1,)) and first.shape[1] == second.shape[0]
        assert isinstance(first.shape[1], int) == (name == "decode")
    for prompt in (TEXT, TEXT[:1]):
        assert run_as_the_engine(programs, prompt, NEW_TOKENS) == eager_greedy(model, prompt, NEW_TOKENS)
    layers = range(model.model.config.num_hidden_layers)
    assert cache_buffers(programs) == {f"kv_cache.{kind}_{layer}" for kind in ("key", "value") for layer in layers}


@pytest.mark.transformers
@pytest.mark.exhaustive
def test_recurrent_layers_have_their_state_in_mutable_buffers() -> None:
    """One token at position 0 is decode in that engine, and starts a new text there."""
    model = RECURRENT[0].model("batched_mm")
    module, alone = EngineLM(model, 16), CausalLM(model, 16)
    names = {f"kv_cache.{name}" for name, _ in module.kv_cache.named_buffers()}
    assert any("conv_" in name for name in names) and any("recurrent_" in name for name in names)
    with torch.no_grad():
        for prompt in ([5, 6, 7], [9]):
            ids = list(prompt)
            for start in (0, *range(len(prompt), 8)):
                inputs = torch.tensor([ids[start:]]), torch.arange(start, len(ids))
                expected = int(alone(*inputs).argmax())
                assert module(*inputs, COLD).item() == expected
                ids.append(expected)
    assert cache_buffers(export_methods(module)) == names


def test_a_warm_temperature_draws_anew_in_each_call(programs: dict[str, ExportedProgram]) -> None:
    decode = programs["decode"].module()
    inputs = torch.tensor([[TEXT[0]]]), torch.tensor([0])
    with torch.no_grad():
        assert len({decode(*inputs, torch.tensor([5.0])).item() for _ in range(20)}) > 5
        assert len({decode(*inputs, COLD).item() for _ in range(5)}) == 1


class Config:
    vocab_size, num_hidden_layers, max_position_embeddings = 264, 2, 512
    eos_token_id, bos_token_id = 257, 256
    layer_types: tuple[str, ...] = ("full_attention", "full_attention")


def test_the_constants_that_the_engine_reads() -> None:
    options = ExportOptions("tiny", target=Target("sm_90"), context=Context(64, "engine"))
    constants = constant_methods(options, Config, 64, "{}", {"kv_cache.value_0", "kv_cache.key_0"})
    told = json.loads(constants["get_mutable_buffer_metadata"])
    assert told == {"version": 1, "mutable_buffers": ["kv_cache.key_0", "kv_cache.value_0"]}
    # get_llm_metadata of ExecuTorch's runners fails without the first, and reads the others.
    assert constants["get_max_seq_len"] == constants["get_max_context_len"] == 64
    assert (constants["use_kv_cache"], constants["enable_dynamic_shape"]) == (True, True)
    assert constants["get_eos_ids"] == [257] and constants["get_method_output"] == "engine"

    class Huge(Config):
        vocab_size = 2**24 + 1

    with pytest.raises(ValueError, match=r"returns tokens in fp32, which is exact up to 16777216, and .* has 16777217"):
        constant_methods(options, Huge, 64, "{}")


def test_what_the_engine_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output='engine' is for CUDA targets, on the CPU .* a KV cache of its own"):
        ExportOptions("tiny", target=Target("cpu"), context=Context(64, "engine"))
    with pytest.raises(ValueError, match="output='engine' does not support max_batch=4"):
        Context(64, "engine", 4)


def options_for(out: Path, target: str, dtype: str) -> ExportOptions:
    return ExportOptions("tiny", out, target=Target(target, dtype), context=Context(MAX_CONTEXT, "engine"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_engine_finds_its_methods_and_every_mutable_buffer(tmp_path: Path) -> None:
    """The coverage check of cuda_mutable_state.cpp: each name is a constant of a method, with one size in all."""
    if why := host_toolchain.why_no_toolchain():
        pytest.skip(why)
    pte = tmp_path / "engine.pte"
    export_model(options_for(pte, "sm_90,sm_80", "auto"))
    program = PteFile(pte)
    assert set(program.method_names) == {"prefill", "decode", "prefill@sm_80", "decode@sm_80"}
    told = set(json.loads(program.constant("get_mutable_buffer_metadata"))["mutable_buffers"])
    sizes: dict[str, set[int]] = {name: set() for name in told}
    for method in program.method_names:
        tokens, positions, temperature = program.inputs(method)
        assert [entry.dtype for entry in (tokens, positions, temperature)] == [torch.int64, torch.int64, torch.float32]
        assert temperature.sizes == (1,)
        (delegate,) = program.plan(method).delegates
        for weight in parse_delegate(program.delegate_data(delegate), method).weights:
            if weight.fqn in told:
                sizes[weight.fqn].add(weight.storage_nbytes)
    assert all(len(found) == 1 for found in sizes.values())
    stored = {key.rpartition(":")[2] for key in PtdFile(pte.with_suffix(".ptd")).sizes()}
    assert told <= stored and {name for name in stored if name.startswith("kv_cache")} == told


@pytest.mark.gpu
def test_tokens_on_a_gpu(made_once: Callable[[str, Callable[[Path], None]], Path]) -> None:
    def make(folder: Path) -> None:
        export_model(options_for(folder / "tiny.pte", "cuda", "fp32"))

    folder = made_once("engine", make)
    model = eager_model("w4a16", "cuda", "fp32")
    for graph in (False, True):
        generator = TextGenerator.load(folder / "tiny.pte", "delegate-host", cuda_graph=graph)
        for prompt in (TEXT, TEXT[:1]):
            result = generator.generate(prompt, NEW_TOKENS, Sampler(1e-6), ignore_eos=True)
            assert result.tokens == eager_greedy(model, prompt, NEW_TOKENS)
        texts = {tuple(generator.generate(TEXT, NEW_TOKENS, Sampler(2.0), ignore_eos=True).tokens) for _ in range(4)}
        assert len(texts) > 1, "each call has new noise, in a CUDA graph too"
