"""A plain single-process reference of routed training, as literal as possible.

It shares no code with the rest of `skvr_dist`: parameters are a dictionary by canonical name, every layer's keys and
values are computed and kept, attention is the formula, a reader looks its donor up in the list, and AdamW is written
out. What is drawn at random comes from `skvr_dist.lab.verify.draws`. Everything else in the project is compared with
it.

Shapes: Q micro-batches of B sequences of S + 1 tokens, L layers, E head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last dimension, times a weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def frequencies(shape: dict) -> Tensor:
    """Radians per position of each rotated pair, [E / 2], scaled as Llama 3.1 or linearly if the model says so."""
    size = shape["head_dim"]
    scaling = shape.get("rope_scaling")
    result = []
    for pair in range(size // 2):
        # In fp32, as all implementations: at large positions another rounding would be another angle.
        frequency = shape["rope_theta"] ** (-torch.tensor(2 * pair, dtype=torch.float32) / size)
        result.append(frequency if scaling is None else frequency * _stretched(2 * math.pi / float(frequency), scaling))
    return torch.stack(result)


def _stretched(wavelength: float, scaling: dict) -> float:
    """What a frequency is multiplied by."""
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return 1 / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    if wavelength < context / high:
        return 1.0
    if wavelength > context / low:
        return 1 / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) / factor + smooth


def rotary(x: Tensor, shape: dict, positions: Tensor) -> Tensor:
    """x [B, S, heads, E]: rotate the pair (i, i + E/2) by positions [B, S] * its frequency."""
    half = x.shape[3] // 2
    angle = positions.float()[:, :, None] * frequencies(shape)
    cos, sin = angle.cos()[:, :, None, :], angle.sin()[:, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def places(tokens: Tensor, separate_at: int | None) -> tuple[Tensor, Tensor]:
    """The document of each token [B, S] and its place in it, each [B, S]; token `separate_at` ends documents."""
    documents, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, sequence in enumerate(tokens.tolist()):
        document = position = 0
        for column, token in enumerate(sequence):
            documents[row, column], positions[row, column] = document, position
            position += 1
            if token == separate_at:
                document, position = document + 1, 0
    return documents, positions


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """q [B, S, H, E] against k, v [B, S, K, E], head by head, within documents [B, S]."""
    heads, kv_heads, sequence = q.shape[2], k.shape[2], q.shape[1]
    hidden = torch.ones(sequence, sequence).triu(1).bool() | (documents[:, :, None] != documents[:, None, :])
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(q.shape[3])
        outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, :, shared])
    return torch.stack(outputs, dim=2)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """The linear layer `name`, with its bias if it has one."""
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def logits(w: Weights, shape: dict, tokens: Tensor, donors: list[int], separate_at: int | None = None) -> Tensor:
    """Logits [B, S, V] of tokens [B, S]; `shape` is the model section of a configuration.

    `separate_at` is the token that ends documents, if none is to see the others.
    """
    eps, head_dim = shape["rms_norm_eps"], shape["head_dim"]
    documents, positions = places(tokens, separate_at)
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
        keys.append(rotary(k, shape, positions))
        values.append(v)
        query, donor = rotary(q, shape, positions), donors[layer]
        attended = causal_attention(query, keys[donor], values[donor], documents)
        hidden = hidden + linear(attended.flatten(2), w, f"{name}.self_attn.o_proj")
        x = rms_norm(hidden, w[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = linear(x, w, f"{name}.mlp.gate_proj"), linear(x, w, f"{name}.mlp.up_proj")
        hidden = hidden + linear(gate * torch.sigmoid(gate) * up, w, f"{name}.mlp.down_proj")
    hidden = rms_norm(hidden, w["norm.weight"], eps)
    return hidden @ w["embed_tokens.weight" if shape["tie_word_embeddings"] else "lm_head.weight"].T


def token_losses(w: Weights, shape: dict, tokens: Tensor, donors: list[int], separate_at: int | None = None) -> Tensor:
    """Cross entropy [B, S] of every token but the first of sequences [B, S + 1]."""
    return cross_entropy(logits(w, shape, tokens[:, :-1], donors, separate_at), tokens)


def cross_entropy(predicted: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy [B, S] of logits [B, S, V] against every token but the first of sequences [B, S + 1]."""
    log_probability = predicted - predicted.logsumexp(-1, keepdim=True)
    return -log_probability.gather(-1, tokens[:, 1:, None]).squeeze(-1)


@dataclass(frozen=True)
class Distillation:
    """What a distilled micro-batch learns."""

    weight: float
    """Share of the divergence."""
    temperature: float
    full_weight: float
    """Of the cross entropy at full retention, where each of `passes` has 1."""
    passes: list[list[int] | None]
    """Donors of each pass that learns; None: those that were drawn."""
    teacher: tuple[Weights, dict] | None = None
    """Another model's weights and shape; None: the model itself, at full retention."""


def distilled_losses(
    w: Weights, shape: dict, tokens: Tensor, donors: list[int], how: Distillation, separate_at: int | None = None
) -> Tensor:
    """Loss [B, S] of every token but the first of sequences [B, S + 1], averaged over the passes by their weights."""
    inputs = tokens[:, :-1]
    teacher, teacher_shape = how.teacher or (w, shape)
    full = logits(teacher, teacher_shape, inputs, list(range(teacher_shape["num_hidden_layers"])), separate_at)
    log_target = (full.detach() / how.temperature).log_softmax(-1)
    total = how.full_weight * cross_entropy(full, tokens)
    for each in how.passes:
        student = logits(w, shape, inputs, donors if each is None else each, separate_at)
        log_student = (student / how.temperature).log_softmax(-1)
        divergence = (log_target.exp() * (log_target - log_student)).sum(-1)
        total = total + (1 - how.weight) * cross_entropy(student, tokens)
        total = total + how.weight * how.temperature**2 * divergence
    return total / (how.full_weight + len(how.passes))


def loss(w: Weights, shape: dict, tokens: Tensor, donors: list[int]) -> Tensor:
    """Mean next-token cross entropy of sequences [B, S + 1]."""
    return token_losses(w, shape, tokens, donors).mean()


def evaluation_loss(
    weights: Weights,
    shape: dict,
    batch: Tensor,
    donors: list[int],
    *,
    labelled: Tensor | None = None,
    separate_at: int | None = None,
) -> float:
    """Mean loss of a batch [Q, B, S + 1] with the same donors [L] in all of it, over what `train` counts."""
    losses = torch.stack([token_losses(weights, shape, tokens, donors, separate_at) for tokens in batch])
    return losses[_counted(batch, labelled, separate_at)].mean().item()


def _counted(batch: Tensor, labelled: Tensor | None, separate_at: int | None) -> Tensor:
    """Which tokens of a batch [Q, B, S + 1] are predicted, bool [Q, B, S]."""
    mask = torch.ones_like(batch[..., 1:], dtype=torch.bool) if labelled is None else labelled
    return mask if separate_at is None else mask & (batch[..., :-1] != separate_at)


def learning_rate(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    floor: float,
    decay: str = "cosine",
    decay_steps: int | None = None,
) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of `steps`.

    It rises in equal parts to the peak at the last of `warmup_steps`, then follows a cosine (or a line) from the peak,
    at the step after or at the first of the last `decay_steps`, to `floor` times the peak at the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    first, last = warmup_steps if decay_steps is None else steps - decay_steps, steps - 1
    done = max(step - first, 0) / (last - first) if last > first else 0.0
    falling = 1 - done if decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return peak * (floor + (1 - floor) * falling)


class AdamW:
    """Adam with decoupled weight decay of the matrices (arXiv 1711.05101, algorithm 2), on clipped gradients."""

    def __init__(
        self, weights: Weights, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, clip: float
    ) -> None:
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.lr, self.betas, self.eps, self.weight_decay, self.clip = lr, betas, eps, weight_decay, clip
        self.steps = 0

    def step(self, gradients: Weights, lr: float | None = None) -> float:
        """Change the weights; returns the norm of all gradients before clipping. A `clip` of 0 clips nothing."""
        self.steps += 1
        lr = self.lr if lr is None else lr
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
        scale = self.clip / (norm + 1e-6) if 0 < self.clip < norm else 1.0
        (beta1, beta2), number = self.betas, self.steps
        for name, weight in self.weights.items():
            grad = gradients[name] * scale
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * grad
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * grad**2
            direction = self.first[name] / (1 - beta1**number)
            size = (self.second[name] / (1 - beta2**number)).sqrt()
            decay = lr * self.weight_decay if weight.dim() >= 2 else 0.0
            self.weights[name] = weight - decay * weight - lr * direction / (size + self.eps)
        return norm


def train(
    weights: Weights,
    shape: dict,
    batches: list[Tensor],
    plans: list[list[list[int]]],
    *,
    clip: float,
    optimizer: dict,
    learning_rates: list[float] | None = None,
    labelled: list[Tensor] | None = None,
    separate_at: int | None = None,
    dtype: torch.dtype = torch.float32,
    distillation: Distillation | None = None,
    distilled: list[list[bool]] | None = None,
) -> dict:
    """AdamW (with the parameters in `optimizer`) over steps.

    `batches[t]` is [Q, B, S + 1] and `plans[t]` the donors [Q][L] of step t. Its loss is the mean over all tokens of
    the batch that are predicted: those that `labelled[t]`, bool [Q, B, S], marks, or else all but each sequence's
    first; but never what follows the token `separate_at`, which ends documents.

    Micro-batch q of step t is distilled where `distilled[t][q]` says so.

    With a `dtype` of fewer bits the gradients are those at the weights rounded to it, computed in fp32.

    Returns losses, gradient norms and gradients per step, and the final weights.
    """
    adamw = AdamW(weights, clip=clip, **optimizer)
    rates = learning_rates or [adamw.lr] * len(batches)
    masks: Sequence[Tensor | None] = labelled or [None] * len(batches)
    result: dict = {"losses": [], "norms": [], "gradients": []}
    which = distilled or [[False] * len(batch) for batch in batches]
    for batch, mask, plan, rate, marks in zip(batches, masks, plans, rates, which, strict=True):
        w = {name: value.to(dtype).float().clone().requires_grad_() for name, value in adamw.weights.items()}
        losses = [
            distilled_losses(w, shape, tokens, row, distillation, separate_at)
            if distillation and mark
            else token_losses(w, shape, tokens, row, separate_at)
            for tokens, row, mark in zip(batch, plan, marks, strict=True)
        ]
        total = torch.stack(losses)[_counted(batch, mask, separate_at)].mean()
        # A weight that no micro-batch used has a gradient of zero, not none: AdamW must still decay it.
        found = torch.autograd.grad(total, list(w.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(w, found, strict=True))
        result["norms"].append(adamw.step(gradients, rate))
        result["losses"].append(total.item())
        result["gradients"].append(gradients)
    result["weights"] = adamw.weights
    return result
