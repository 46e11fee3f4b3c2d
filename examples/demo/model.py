"""The demonstration model and its tokenizer, untrained, and the losses that are added to the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .corpus import END

VOCABULARY_SIZE = 4096
SEED = 20


def train_tokenizer(documents: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """A byte-level BPE tokenizer: `END` is token 0, all 256 bytes are pieces, so any text comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """The tokens of all documents, `END` before each, [N] int64."""
    end = tokenizer.token_to_id(END)
    tokens = [token for document in documents for token in (end, *tokenizer.encode(document).ids)]
    return torch.tensor([*tokens, end], dtype=torch.int64)


def make_config(vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """Qwen3-MoE with 4 layers of 8 experts, top-2, hidden 256: 5.0 million parameters, 10 MB in bf16."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.03,
    )


def dense_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module of transformers in two matrix products: all experts, those not chosen times zero.

    For experts this small it is faster than sorting tokens by expert, although it computes E / top_k times as much, and
    nothing waits for the GPU.

    Args:
        module: with gate_up_proj [E, 2I, H] and down_proj [E, H, I], silu.
        hidden_states: [T, H].
        top_k_index: int64 [T, top_k].
        top_k_weights: [T, top_k].

    Returns:
        [T, H].
    """
    experts, double, _ = module.gate_up_proj.shape
    weights = hidden_states.new_zeros(hidden_states.shape[0], experts, dtype=top_k_weights.dtype)
    weights = weights.scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, module.gate_up_proj.flatten(0, 1)).unflatten(1, (experts, double))
    gate, up = gate_up.chunk(2, -1)
    hidden = (F.silu(gate) * up * weights[..., None].to(gate.dtype)).flatten(1)  # [T, E * I]
    down = module.down_proj.permute(1, 0, 2).flatten(1)  # [H, E * I]
    return F.linear(hidden, down).to(hidden_states.dtype)


def make_model(config: Any, experts: str = "dense", seed: int = SEED) -> nn.Module:
    """An untrained model; `experts` is "dense" or an `experts_implementation` of transformers."""
    from transformers import Qwen3MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    # Set afterwards, for transformers checks the name against its own.
    model.config._experts_implementation = experts
    # Branches into the residual stream start smaller, by the square root of their number (GPT-2).
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.experts.down_proj.mul_(scale)
    return model


def add_dropout(model: nn.Module, probability: float) -> list[Any]:
    """Drops outputs of embedding, attention and experts while training; returns the handles that remove it again."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp.experts]
    return [module.register_forward_hook(drop) for module in modules]


def router_balance(router_logits: Iterable[Tensor], top_k: int) -> Tensor:
    """Balance loss of Switch Transformers: experts x sum(share of tokens x mean probability), 1 when balanced."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1 / top_k)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def repetition_loss(logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Unlikelihood of repeated trigrams, a mean over tokens; it teaches the model not to go round in circles.

    Where the last two tokens have occurred before in the sequence, the token that followed them then, if it is not the
    right one now, costs -log(1 - its probability). After Welleck et al., Neural Text Generation with Unlikelihood
    Training, 2019.

    Args:
        logits: [B, T, V].
        inputs: int64 [B, T].
        targets: int64 [B, T], the token after each input.
    """
    same = inputs[:, :, None] == inputs[:, None, :]  # [B, now, earlier]
    pairs = same & F.pad(same[:, :-1, :-1], (1, 0, 1, 0))
    repeats = (pairs & (targets[:, :, None] != targets[:, None, :])).tril(-1)
    followers = targets[:, None, :].expand(-1, inputs.shape[1], -1)
    probability = logits.log_softmax(-1).gather(-1, followers).exp()
    return -(torch.log1p(-probability.clamp(max=0.999)) * repeats).sum() / targets.numel()
