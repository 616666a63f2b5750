"""A plain single-process reference of routed training, as literal as possible.

It shares no code with the rest of `skvr_dist`: parameters are a dictionary by canonical name, every layer's keys and
values are computed and kept, attention is the formula, and a reader looks its donor up in the list. Everything else
in the project is held against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotary(x: Tensor, theta: float) -> Tensor:
    """x [B, S, heads, E]: rotate the pair (i, i + E/2) at position s by s * theta^(-2i/E)."""
    sequence, size = x.shape[1], x.shape[3]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(sequence, dtype=torch.float32)[:, None] * frequency[None, :]
    cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, S, H, E] against k, v [B, S, K, E], head by head."""
    heads, kv_heads, sequence = q.shape[2], k.shape[2], q.shape[1]
    future = torch.ones(sequence, sequence).triu(1).bool()
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(q.shape[3])
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, shared])
    return torch.stack(outputs, dim=2)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def logits(w: Weights, shape: dict, tokens: Tensor, donors: list[int]) -> Tensor:
    """Logits [B, S, V] of tokens [B, S]; `shape` is the model section of a configuration."""
    eps, theta, head_dim = shape["rms_norm_eps"], shape["rope_theta"], shape["head_dim"]
    hidden = w["embed_tokens.weight"][tokens]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in range(shape["num_hidden_layers"]):
        name = f"layers.{layer}"
        x = rms_norm(hidden, w[f"{name}.input_layernorm.weight"], eps)
        q = linear(x, w, f"{name}.self_attn.q_proj").unflatten(-1, (-1, head_dim))
        k = linear(x, w, f"{name}.self_attn.k_proj").unflatten(-1, (-1, head_dim))
        v = linear(x, w, f"{name}.self_attn.v_proj").unflatten(-1, (-1, head_dim))
        if shape["qk_norm"]:
            q = rms_norm(q, w[f"{name}.self_attn.q_norm.weight"], eps)
            k = rms_norm(k, w[f"{name}.self_attn.k_norm.weight"], eps)
        keys.append(rotary(k, theta))
        values.append(v)
        attended = causal_attention(rotary(q, theta), keys[donors[layer]], values[donors[layer]])
        hidden = hidden + linear(attended.flatten(2), w, f"{name}.self_attn.o_proj")
        x = rms_norm(hidden, w[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = linear(x, w, f"{name}.mlp.gate_proj"), linear(x, w, f"{name}.mlp.up_proj")
        hidden = hidden + linear(gate * torch.sigmoid(gate) * up, w, f"{name}.mlp.down_proj")
    hidden = rms_norm(hidden, w["norm.weight"], eps)
    return hidden @ w["embed_tokens.weight" if shape["tie_word_embeddings"] else "lm_head.weight"].T


def token_losses(w: Weights, shape: dict, tokens: Tensor, donors: list[int]) -> Tensor:
    """Cross entropy [B, S] of every token but the first of sequences [B, S + 1]."""
    predicted = logits(w, shape, tokens[:, :-1], donors)
    log_probability = predicted - predicted.logsumexp(-1, keepdim=True)
    return -log_probability.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def loss(w: Weights, shape: dict, tokens: Tensor, donors: list[int]) -> Tensor:
    """Mean next-token cross entropy of sequences [B, S + 1]."""
    return token_losses(w, shape, tokens, donors).mean()


def train(
    weights: Weights,
    shape: dict,
    batches: list[Tensor],
    plans: list[list[list[int]]],
    *,
    clip: float,
    optimizer: dict,
    labelled: list[Tensor] | None = None,
) -> dict:
    """AdamW (with the parameters in `optimizer`) over steps, matrices decayed.

    `batches[t]` is [Q, B, S + 1] and `plans[t]` the donors [Q][L] of step t. Its loss is the mean over all tokens of
    the batch that are predicted: those that `labelled[t]`, bool [Q, B, S], marks; without it all but each first.

    Returns losses and gradient norms per step, the gradients of the first step, and the final weights.
    """
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    decayed = [p for p in w.values() if p.dim() >= 2]
    plain = [p for p in w.values() if p.dim() < 2]
    groups: list[dict] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, **optimizer)
    result: dict = {"losses": [], "norms": []}
    masks = labelled or [torch.ones_like(batch[..., 1:], dtype=torch.bool) for batch in batches]
    for batch, mask, plan in zip(batches, masks, plans, strict=True):
        losses = [token_losses(w, shape, tokens, donors) for tokens, donors in zip(batch, plan, strict=True)]
        total = torch.stack(losses)[mask].mean()
        # A weight that no micro-batch used has a gradient of zero, not none: AdamW must still decay it.
        gradients = torch.autograd.grad(total, list(w.values()), allow_unused=True, materialize_grads=True)
        result.setdefault("gradients", {name: grad.clone() for name, grad in zip(w, gradients, strict=True)})
        norm = torch.stack([(grad**2).sum() for grad in gradients]).sum().sqrt()
        for parameter, grad in zip(w.values(), gradients, strict=True):
            parameter.grad = grad * (clip / (norm + 1e-6)) if norm > clip else grad
        adamw.step()
        result["losses"].append(total.item())
        result["norms"].append(norm.item())
    result["weights"] = {name: p.detach().clone() for name, p in w.items()}
    return result
