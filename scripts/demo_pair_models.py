"""The embedded pair's models in PyTorch: a Llama model, and a DFlash head on its layers.

The names of the parameters are those of the public formats, so that exporting copies tensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

THETA = 10_000.0
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Size of a model: key heads are shared by all heads."""

    layers: int
    width: int
    heads: int
    head_size: int
    hidden: int


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves apart; x [B, H, T, D], positions [B or 1, T]."""
    half = x.shape[-1] // 2
    scale = THETA ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * scale
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), EPS)


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Attention(nn.Module):
    """Attention with one key head. `normed`: queries and keys are normed, as in Qwen3."""

    def __init__(self, shape: Shape, normed: bool) -> None:
        super().__init__()
        self.heads, self.size = shape.heads, shape.head_size
        inner, std = shape.heads * shape.head_size, shape.width**-0.5
        self.q_proj = linear(shape.width, inner, std)
        self.k_proj = linear(shape.width, shape.head_size, std)
        self.v_proj = linear(shape.width, shape.head_size, std)
        self.o_proj = linear(inner, shape.width, inner**-0.5 * (2 * shape.layers) ** -0.5)
        if normed:
            self.q_norm, self.k_norm = Norm(shape.head_size), Norm(shape.head_size)
        self.normed = normed

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        return rotated(self.q_norm(q) if self.normed else q, positions)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k_proj(x)[:, None], self.v_proj(x)[:, None]
        return rotated(self.k_norm(k) if self.normed else k, positions), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        std = shape.width**-0.5
        self.gate_proj = linear(shape.width, shape.hidden, std)
        self.up_proj = linear(shape.width, shape.hidden, std)
        self.down_proj = linear(
            shape.hidden, shape.width, shape.hidden**-0.5 * (2 * shape.layers) ** -0.5
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, normed: bool = False) -> None:
        super().__init__()
        self.self_attn = Attention(shape, normed)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape.width)
        self.post_attention_layernorm = Norm(shape.width)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        """A whole text, [B, T, width]."""
        x, attention = self.input_layernorm(h), self.self_attn
        k, v = attention.keys_values(x, positions)
        h = h + attention.attend(attention.queries(x, positions), k, v, None, True)
        return h + self.mlp(self.post_attention_layernorm(h))

    def step(self, h: Tensor, positions: Tensor, past: tuple[Tensor, Tensor], at: int) -> Tensor:
        """Tokens that follow `at` earlier ones, whose keys and values stand in `past`."""
        x, attention, end = self.input_layernorm(h), self.self_attn, at + h.shape[1]
        for kept, new in zip(past, attention.keys_values(x, positions), strict=True):
            kept[:, :, at:end] = new
        k, v = (kept[:, :, :end] for kept in past)
        h = h + attention.attend(attention.queries(x, positions), k, v, None, at == 0)
        return h + self.mlp(self.post_attention_layernorm(h))

    def block(self, h: Tensor, places: Tensor, c: Tensor, before: Tensor, mask: Tensor) -> Tensor:
        """Blocks that see themselves and rows of context `c` [B, T, width] at `before`."""
        x, attention = self.input_layernorm(h), self.self_attn
        k, v = attention.keys_values(x, places)
        k_c, v_c = attention.keys_values(c, before)
        k, v = torch.cat([k_c, k], dim=2), torch.cat([v_c, v], dim=2)
        h = h + attention.attend(attention.queries(x, places), k, v, mask, False)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    """A Llama model whose output layer is its embedding."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(vocab_size, shape.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)

    def forward(self, tokens: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last norm, [B, T, width], and outputs of the layers `taps`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h, seen = self.embed_tokens(tokens), []
        for index, layer in enumerate(self.layers):
            h = layer(h, positions)
            if index in taps:
                seen.append(h)
        return self.norm(h), seen

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))

    @torch.no_grad()
    def written(self, prompts: Tensor, length: int, temperature: Tensor) -> Tensor:
        """Prompts [B, N] and what follows, [B, length]; temperature [B], 0 is greedy."""
        batch, at = len(prompts), 0
        room = (batch, 1, length, self.shape.head_size)
        device = prompts.device
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else torch.float32
        pasts = [
            tuple(torch.zeros(room, device=device, dtype=dtype) for _ in "kv") for _ in self.layers
        ]
        out, tokens = [prompts], prompts
        for _ in range(length - prompts.shape[1]):
            positions = torch.arange(at, at + tokens.shape[1], device=tokens.device)[None]
            h = self.embed_tokens(tokens)
            for layer, past in zip(self.layers, pasts, strict=True):
                h = layer.step(h, positions, past, at)
            at += tokens.shape[1]
            scores = self.logits(self.norm(h[:, -1])).float()
            noise = -torch.log(torch.empty_like(scores).exponential_())
            tokens = (scores + noise * temperature[:, None]).argmax(-1, keepdim=True)
            out.append(tokens)
        return torch.cat(out, dim=1)

    def export(self, folder: Path, context: int) -> None:
        shape, vocab = self.shape, self.embed_tokens.num_embeddings
        weights = {f"model.{name}": t for name, t in self.state_dict().items()}
        config = llama_config(shape, vocab, context)
        save(folder, weights, config)


class Head(nn.Module):
    """DFlash (z-lab/dflash): all tokens of a proposal in one pass over a block of masks.

    A context row for each token that the target has read is made from the outputs of the layers
    `taps`. A block is the last token, of which the target has read nothing, and masks behind it.
    """

    def __init__(self, shape: Shape, taps: tuple[int, ...], block: int, mask: int) -> None:
        super().__init__()
        self.shape, self.taps, self.size, self.mask = shape, taps, block, mask
        self.fc = linear(len(taps) * shape.width, shape.width, (len(taps) * shape.width) ** -0.5)
        self.hidden_norm = Norm(shape.width)
        self.layers = nn.ModuleList(Layer(shape, normed=True) for _ in range(shape.layers))
        self.norm = Norm(shape.width)

    def forward(self, features: Tensor, first: Tensor, anchors: Tensor, masked: Tensor) -> Tensor:
        """Hidden states of blocks, [B, A, size, width].

        Args:
            features: the taps' outputs side by side, [B, T, taps · width]. first: embeddings
            [B, A, width] of the tokens at `anchors` [B, A], which see the context before them.
            masked: [width].
        """
        c = self.hidden_norm(self.fc(features))
        batch, count = anchors.shape
        steps = torch.arange(self.size, device=anchors.device)
        before = torch.arange(c.shape[1], device=anchors.device)[None]
        places = (anchors[..., None] + steps).flatten(1)
        h = torch.cat(
            [first[:, :, None], masked.expand(batch, count, self.size - 1, -1)], dim=2
        ).flatten(1, 2)
        number = torch.arange(count, device=anchors.device).repeat_interleave(self.size)
        own = (number[:, None] == number)[None].expand(batch, -1, -1)
        context = before[:, None, :] < anchors.repeat_interleave(self.size, dim=1)[..., None]
        mask = torch.cat([context, own], dim=-1)[:, None]
        for layer in self.layers:
            h = layer.block(h, places, c, before, mask)
        return self.norm(h).unflatten(1, (count, self.size))

    def export(self, folder: Path, target: Llama, context: int) -> None:
        shape = self.shape
        config = llama_config(shape, target.embed_tokens.num_embeddings, context)
        config |= {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "block_size": self.size,
            "num_target_layers": target.shape.layers,
            "layer_types": ["full_attention"] * shape.layers,
            "dflash_config": {"mask_token_id": self.mask, "target_layer_ids": list(self.taps)},
        }
        save(folder, dict(self.state_dict()), config)


def llama_config(shape: Shape, vocab_size: int, context: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 1,
        "head_dim": shape.head_size,
        "intermediate_size": shape.hidden,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "float32",
    }


def save(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def described(model: nn.Module, shape: Shape) -> dict[str, Any]:
    return {**asdict(shape), "parameters": sum(p.numel() for p in model.parameters())}
