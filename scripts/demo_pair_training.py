"""The training loop of the embedded pair: optimizers, schedule, losses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_pair_text import windows
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` updates on `batch` windows of `length` tokens."""

    steps: int
    batch: int
    length: int


def learning_rate(step: int, total: int) -> float:
    """Warm-up, then constant, then linear to zero over the last 30%; a factor in 0…1.

    A constant middle means that a resumed run may be given more or fewer steps.
    """
    warm, decay = 100, 0.3 * total
    return min(1.0, (step + 1) / warm, (total - step) / decay)


class Optimizers:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""

    def __init__(self, model: LlamaForCausalLM, peak: float) -> None:
        named = list(model.named_parameters())
        hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        other = [p for n, p in named if p.ndim != 2 or "embed" in n]
        self.peak = peak
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(other, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, factor: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.peak * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(phases: list[Phase]) -> Iterator[tuple[int, Phase]]:
    step = 0
    for phase in phases:
        for _ in range(phase.steps):
            yield step, phase
            step += 1


def train(
    name: str,
    model: LlamaForCausalLM,
    loss_of: Callable[[int, Phase], torch.Tensor],
    held_out_loss: Callable[[], float],
    phases: list[Phase],
    peak: float,
    checkpoint: Path,
) -> None:
    """Run what is left of `phases`, saving a checkpoint every 250 steps and at the end."""
    optimizers = Optimizers(model, peak)
    total, done = sum(p.steps for p in phases), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        done = saved["step"]
    started, tokens = time.perf_counter(), 0
    for step, phase in schedule(phases):
        if step < done:
            continue
        loss = loss_of(step, phase)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(step, total))
        tokens += phase.batch * phase.length
        if (step + 1) % 25 == 0:
            speed = tokens / (time.perf_counter() - started)
            print(f"{name} {step + 1}/{total}  loss {loss.item():.3f}  {speed:,.0f} tokens/s")
        if (step + 1) % 250 == 0 or step + 1 == total:
            print(f"{name} {step + 1}/{total}  held-out loss {held_out_loss():.3f}")
            state = {
                "model": model.state_dict(),
                "optimizers": optimizers.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        sys.stdout.flush()


def logits_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x, use_cache=False).logits.float()


def next_token_loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_of(model, x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def mean_held_out_loss(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Nats per token over fixed held-out windows of 512 tokens."""
    with torch.no_grad():
        losses = [next_token_loss(model, windows(stream, -1 - i, 8, 512)) for i in range(8)]
    return float(torch.stack(losses).mean())
