"""`gated_delta_net` on the CPU: against transformers' layers, as torch wants operators, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from executorch_moe.kernels.delta_rule.arguments import DeltaRuleArguments, DeltaRuleSizes, fits_delta_rule
from executorch_moe.kernels.delta_rule.op import gated_delta_net
from executorch_moe.kernels.delta_rule.reference import gated_delta_net_reference

from .delta_rule_cases import GATES, LENGTHS, TINY, errors, make, relative_error


def layer_of(family: str) -> Any:
    """A layer of transformers with random weights."""
    sizes = {
        "hidden_size": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
    }  # fmt: skip
    if family == "qwen3_next":
        from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        made = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**sizes), 0)
    else:
        from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

        made = Qwen3_5MoeGatedDeltaNet(Qwen3_5MoeTextConfig(**sizes), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (name == "norm.weight"))
    return made.eval()


def projected_of(layer: Any, hidden: Tensor) -> Tensor:
    if not hasattr(layer, "in_proj_qkvz"):
        parts = (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)
        return torch.cat([part(hidden) for part in parts], -1)
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(
        layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden)
    )
    return torch.cat([part.flatten(2) for part in (query, key, value, z, b, a)], -1)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("tokens", LENGTHS)
@torch.no_grad()
def test_a_layer_is_that_of_transformers(family: str, tokens: int) -> None:
    layer = layer_of(family)
    hidden = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(tokens))
    projected = projected_of(layer, hidden)[0]
    for operator in (gated_delta_net, gated_delta_net_reference):
        state = torch.full((4, 16, 32), torch.nan)
        out, conv_state, state = operator(
            projected, layer.conv1d.weight.squeeze(1), layer.dt_bias, layer.A_log, layer.norm.weight,
            torch.full((4, 192), torch.nan), state, torch.tensor([0]), 2, 16, layer.layer_norm_epsilon,
        )  # fmt: skip
        assert relative_error(layer.out_proj(out), layer(hidden)[0]) < 1e-5
        for position in range(tokens - 4, tokens):
            row = projected[position, :192] if position >= 0 else torch.zeros(192)
            assert torch.equal(conv_state[position % 4], row)
        assert state.isfinite().all()


@torch.no_grad()
def test_states_are_those_of_transformers() -> None:
    """A prompt, then tokens one by one: the cache of transformers holds the same states, in its own layouts."""
    from transformers import DynamicCache
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    layer = layer_of("qwen3_5_moe")
    cache = DynamicCache(config=Qwen3_5MoeTextConfig(num_hidden_layers=1, layer_types=["linear_attention"]))
    hidden = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(3))
    states = torch.zeros(4, 192), torch.zeros(4, 16, 32)
    for first, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        expected = layer(hidden[:, first:end], cache=cache)[0]
        out, *states = gated_delta_net(
            projected_of(layer, hidden[:, first:end])[0], layer.conv1d.weight.squeeze(1), layer.dt_bias, layer.A_log,
            layer.norm.weight, *states, torch.tensor([first]), 2, 16, layer.layer_norm_epsilon,
        )  # fmt: skip
        assert relative_error(layer.out_proj(out), expected) < 1e-5
        assert relative_error(states[1], cache.get_recurrent_state(0, state_idx=0)[0]) < 1e-5
        assert (
            relative_error(states[0][torch.arange(end - 3, end) % 4], cache.get_conv_state(0, state_idx=0)[0, :, -3:].T)
            < 1e-6
        )


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("position", [0, 5])
def test_the_cpu_kernel_is_the_reference(gates: str, position: int) -> None:
    arguments = make(TINY, 70, position=position, gates=gates)
    assert max(errors(gated_delta_net(*arguments), gated_delta_net_reference(*arguments))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    arguments = make(TINY, 5, dtype=dtype)
    out, conv_state, state = gated_delta_net(*arguments)
    expected = gated_delta_net_reference(*arguments)
    assert out.dtype == conv_state.dtype == dtype and state.dtype == torch.float32
    assert max(errors((out, conv_state, state), expected)) < 1e-3


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 7), (11, 1)])
def test_a_text_in_pieces_is_the_text_in_one(pieces: tuple[int, ...]) -> None:
    whole = make(TINY, 12, position=0)
    expected = gated_delta_net(*whole)
    rows, states, position = [], (whole.conv_state, whole.recurrent_state), 0
    for piece in pieces:
        part = whole._replace(
            projected=whole.projected[position : position + piece],
            conv_state=states[0],
            recurrent_state=states[1],
            position=torch.tensor([position]),
        )
        out, *states = gated_delta_net(*part)
        rows.append(out)
        position += piece
    assert max(errors((torch.cat(rows), *states), expected)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_operator_as_torch_wants_it(tokens: int) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.executorch_moe.gated_delta_net, tuple(make(TINY, tokens)), test_utils=checks)


def test_no_gradient() -> None:
    arguments = make(TINY, 2)
    arguments.projected.requires_grad_()
    with pytest.raises(NotImplementedError, match="gated_delta_net is for inference only"):
        gated_delta_net(*arguments)[0].sum().backward()


def wider(t: Tensor) -> Tensor:
    """The same values in a tensor that is not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


CHECKS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("projected", lambda t: t.long(), "projected has dtype int64, expected bfloat16 or float32 or float16"),
    ("projected", lambda t: t[:, :-1], r"projected has shape \[3, 327\], expected \[T, 328\]: concatenate query, key"),
    ("projected", lambda t: t[None], r"projected has shape \[1, 3, 328\], expected \[T, 328\]"),
    ("projected", lambda t: t[:0], "projected has T=0 tokens, expected 1 at least"),
    ("conv_weight", lambda t: t[:, None], r"conv_weight has shape \[192, 1, 4\], expected \[C, K\]"),
    ("conv_weight", lambda t: t[:-1], r"conv_weight has shape \[191, 4\], expected \[192, 4\]"),
    ("conv_weight", lambda t: t.repeat(1, 3), r"conv_weight has shape \[192, 12\], expected \[C, K\] with K one of"),
    ("conv_weight", lambda t: t.long(), "conv_weight has dtype int64"),
    ("conv_weight", wider, "conv_weight must be contiguous"),
    ("dt_bias", lambda t: t[:1], r"dt_bias has shape \[1\], expected \[4\]: pass one number for each value head"),
    ("a_log", lambda t: t.long(), "a_log has dtype int64"),
    ("norm_weight", lambda t: t[:1], r"norm_weight has shape \[1\], expected \[32\]"),
    ("conv_state", lambda t: t[1:], r"conv_state has shape \[3, 192\], expected \[4, 192\]"),
    ("conv_state", lambda t: t.bfloat16(), "conv_state has dtype bfloat16, expected float32: convert"),
    ("recurrent_state", lambda t: t.bfloat16(), "recurrent_state has dtype bfloat16, expected float32"),
    ("recurrent_state", lambda t: t[None], r"recurrent_state has shape \[1, 4, 16, 32\], expected \[value_heads,"),
    ("recurrent_state", lambda t: t.mT.contiguous(), "recurrent_state .* expected key_dim=16 in the middle"),
    ("recurrent_state", lambda t: t[..., :24].contiguous(), r"value_dim=24, expected one of \(16, 32, 64, 128\)"),
    ("recurrent_state", lambda t: t.to("meta"), "recurrent_state is on meta but projected is on cpu"),
    ("position", lambda t: t.int(), "position has dtype int32, expected int64"),
    ("position", lambda t: t.repeat(2), r"position has shape \[2\], expected \[1\]"),
    ("num_key_heads", lambda _: 3, "num_key_heads=3 must divide the 4 value heads"),
    ("num_key_heads", lambda _: 0, "num_key_heads=0 must divide"),
    ("eps", lambda _: -1.0, r"eps=-1.0 must be a finite number, 0 or more"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHECKS)
def test_operator_and_fake_refuse_the_same(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments = make(TINY, 3)
    wrong = arguments._replace(**{name: change(getattr(arguments, name))})
    with pytest.raises(ValueError, match=message):
        gated_delta_net(*wrong)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = DeltaRuleArguments(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in wrong))
        with pytest.raises(ValueError, match=message):
            gated_delta_net(*fake)


def test_sizes_that_fit() -> None:
    assert fits_delta_rule(TINY) and fits_delta_rule(DeltaRuleSizes(16, 32, 128, 128, 4))
    for wrong in (TINY._replace(key_dim=24), TINY._replace(value_heads=3), TINY._replace(conv_size=1)):
        assert not fits_delta_rule(wrong)
