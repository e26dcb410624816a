"""A small GPT in plain torch, over bytes.

Pre-norm blocks, rotary positions, causal attention, embedding and output head tied. No dropout and no buffers that
train, so that a run is a pure function of its seed and its data.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.options import GPTConfig


class GPT(nn.Module):
    """A causal language model whose weights depend on `(config, seed)` alone."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self._initialise_(seed)

    @torch.no_grad()
    def _initialise_(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)  # the norms' scales; no layer has a bias
            else:
                std = residual_std if name.endswith("out.weight") else 0.02
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Score `tokens` [B, T] int64.

        Returns:
            The mean cross-entropy in nats (0-d fp32) when `targets` [B, T] is given, else the logits [B, T, vocab].
        """
        x = self.embedding(tokens)  # [B, T, width]
        rotation = rotary_table(tokens.shape[1], self.config.width // self.config.num_heads, x.device)
        for block in self.blocks:
            x = block(x, rotation)
        logits = F.linear(self.norm(x), self.embedding.weight)  # [B, T, vocab]
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention_in = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Map `x` [B, T, width] to the same shape; `rotation` is `rotary_table`'s."""
        batch, length, width = x.shape
        heads = self.attention_in(self.attention_norm(x)).view(
            batch, length, 3, self.num_heads, width // self.num_heads
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, head_dim]
        attended = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        x = x + self.mlp_out(hidden)
        return x


def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] of rotary position embedding."""
    rates = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device), rates)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of `x` [B, heads, T, head_dim] by its position's angle."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    rotated: Tensor = torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)
    return rotated.to(x.dtype)


@torch.no_grad()
def generate(model: GPT, prompt: bytes, num_bytes: int, temperature: float, seed: int) -> bytes:
    """Continue `prompt` by `num_bytes` sampled bytes."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(num_bytes):
        tokens = torch.tensor([text[-model.config.context :]], device=device)
        logits = model(tokens)[0, -1].float().cpu() / temperature
        text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return bytes(text[len(prompt) :])
