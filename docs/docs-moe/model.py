"""A Qwen3-MoE language model for training: the mathematics of transformers' Qwen3MoeForCausalLM.

The experts of a layer are stacked into one parameter a projection, so that an optimizer step is a few large operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, by their names in config.json. The defaults are docs-moe's."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class Losses(NamedTuple):
    """Scalars: nats a token, and the two that keep a router healthy, as means over the layers."""

    cross_entropy: Tensor
    load_balance: Tensor  # 1 when experts share the tokens equally
    router_z: Tensor  # the mean of logsumexp(router logits)², which keeps the logits small


def normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding of [..., positions, head_dim], halves paired."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[:positions] + torch.cat((-second, first), dim=-1) * self.sin[:positions]


class Attention(nn.Module):
    """Grouped-query attention with an RMS norm on every query and key head."""

    def __init__(self, config: ModelConfig, residual_scale: float) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = normal(queries, hidden, std=hidden**-0.5)
        self.k_proj = normal(keys, hidden, std=hidden**-0.5)
        self.v_proj = normal(keys, hidden, std=hidden**-0.5)
        self.o_proj = normal(hidden, queries, std=queries**-0.5 * residual_scale)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor, projection: Tensor) -> Tensor:
        """[batch, positions, heads, head_dim]"""
        return F.linear(x, projection).view(*x.shape[:2], -1, self.head_dim)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q = self.q_norm(self.heads(x, self.q_proj)).transpose(1, 2)
        k = self.k_norm(self.heads(x, self.k_proj)).transpose(1, 2)
        v = self.heads(x, self.v_proj).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotary(q).to(v.dtype), rotary(k).to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj)


class Experts(nn.Module):
    """The mixture: every token goes through its `num_experts_per_tok` likeliest SwiGLU experts."""

    def __init__(self, config: ModelConfig, residual_scale: float) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.router = normal(experts, hidden, std=0.02)
        self.gate_proj = normal(experts, inner, hidden, std=hidden**-0.5)
        self.up_proj = normal(experts, inner, hidden, std=hidden**-0.5)
        self.down_proj = normal(experts, hidden, inner, std=inner**-0.5 * residual_scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture's output for `x` [tokens, hidden], and the two router losses."""
        num_experts = len(self.router)
        with torch.autocast(x.device.type, enabled=False):  # a rounded logit can be another expert
            logits = F.linear(x.float(), self.router)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)

        # The tokens of an expert are made neighbours, so that each expert is three matrix products.
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.top_k
        counts = torch.bincount(chosen.flatten(), minlength=num_experts)
        # unbind: the gradients of all experts' slices are then stacked once, not added one by one.
        gates, ups, downs = self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind()
        outputs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, gate, up, down in zip(
                torch.split(x[tokens], counts.tolist()), gates, ups, downs, strict=True
            )
        ]
        weighted = torch.cat(outputs) * weights.flatten()[order].unsqueeze(1)
        mixed = torch.zeros_like(x).index_add(0, tokens, weighted)

        load = counts / counts.sum()
        load_balance = num_experts * (load * probabilities.mean(0)).sum()
        return mixed, load_balance, logits.logsumexp(-1).square().mean()


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        residual_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, residual_scale)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config, residual_scale)

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        mixed, load_balance, router_z = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + mixed.view_as(x), load_balance, router_z


class LanguageModel(nn.Module):
    """Embeddings are tied: the output head is the embedding matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = normal(config.vocab_size, config.hidden_size, std=0.02)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(self, ids: Tensor) -> Losses:
        """The losses of predicting ids[:, 1:] from ids[:, :-1]; `ids` is int64 [batch, positions + 1]."""
        x = F.embedding(ids[:, :-1], self.embed_tokens)
        load_balance, router_z = [], []
        for layer in self.layers:
            x, balance, z = layer(x, self.rotary)
            load_balance.append(balance)
            router_z.append(z)
        logits = F.linear(self.norm(x), self.embed_tokens).flatten(0, 1)
        cross_entropy = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
        return Losses(cross_entropy, torch.stack(load_balance).mean(), torch.stack(router_z).mean())
