"""The training loop of the embedded pair: optimizers, schedule, losses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from demo_pair_models import Llama
from demo_pair_text import SEED, windows
from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` updates on `batch` rows of `length` tokens."""

    steps: int
    batch: int
    length: int


def learning_rate(step: int, total: int) -> float:
    """Warm-up, then constant, then linear to zero over the last 40%; a factor in 0…1.

    A constant middle means that a resumed run may be given more or fewer steps.
    """
    warm, decay = 100, 0.4 * total
    return min(1.0, (step + 1) / warm, (total - step) / decay)


class Muon:
    """Muon (kellerjordan.github.io/posts/muon): momentum, made orthogonal by Newton–Schulz steps.

    Matrices of one shape are updated together: a deep and thin model has many small ones. The
    update's size matches AdamW's (arXiv 2502.16982).
    """

    def __init__(self, matrices: list[nn.Parameter], decay: float = 0.05) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros_like(torch.stack(group)) for group in self.groups]
        self.decay = decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.mul_(0.95).add_(gradient, alpha=0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95))
            size = 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.float().unbind()), alpha=-rate * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton–Schulz: about the nearest orthogonal matrix of each, [N, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Optimizers:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""

    def __init__(self, model: nn.Module, peak: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        other = [p for n, p in named if p.ndim != 2 or "embed" in n]
        self.peak = peak
        self.muon = Muon(hidden)
        self.adam = torch.optim.AdamW(other, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
        self.all = hidden + other

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.all, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = self.peak * factor
        self.adam.step()
        self.muon.step(self.peak * factor)
        for parameter in self.all:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "muon": self.muon.momenta}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        for mine, saved in zip(self.muon.momenta, state["muon"], strict=True):
            mine.copy_(saved)


@dataclass
class Clock:
    """The updates that fit into `seconds`, told from the first ones; None is no limit."""

    seconds: float | None
    untimed: int = 30  # updates in which graphs are built
    timed: int = 40

    def steps(self, wanted: int, step: int, started: float, built: float) -> int:
        if self.seconds is None or step != self.untimed + self.timed:
            return wanted
        each = (time.perf_counter() - built) / self.timed
        return min(wanted, step + int((self.seconds - (time.perf_counter() - started)) / each))


def in_bfloat16(device: torch.device) -> AbstractContextManager[None]:
    """Matrices are multiplied in bfloat16 on a GPU; few CPUs are faster at that than in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, Phase], Tensor],
    held_out_loss: Callable[[], float],
    phase: Phase,
    peak: float,
    checkpoint: Path,
    seconds: float | None = None,
    last: Phase | None = None,
) -> dict[str, float]:
    """Train, saving a checkpoint every 500 steps and at the end; what was done, for the report.

    Args:
        phase: batches, and the number of updates, or less if they do not fit into `seconds`.
        last: how the last sixteenth of the updates is batched; None is as the others.
    """
    optimizers, clock = Optimizers(model, peak), Clock(seconds)
    total, done = phase.steps, 0
    device = next(model.parameters()).device
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        done, total = saved["step"], saved["total"]
    started = built = time.perf_counter()
    tokens, step = 0, done
    while step < total:
        now = last if last and step >= total - total // 16 else phase
        with in_bfloat16(device):
            loss = loss_of(step, now)
        loss.backward()
        optimizers.step(learning_rate(step, total))
        tokens, step = tokens + now.batch * now.length, step + 1
        if step - done == clock.untimed:
            wait(device)
            built = time.perf_counter()
        if step - done == clock.untimed + clock.timed:
            wait(device)
            total = clock.steps(total, step, started, built)
        if step % 100 == 0:
            speed = tokens / (time.perf_counter() - started)
            print(
                f"{name} {step}/{total}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True
            )
        if step % 500 == 0 or step == total:
            print(f"{name} {step}/{total}  held-out loss {held_out_loss():.3f}", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": optimizers.state_dict(),
                "step": step,
                "total": total,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return {"updates": total, "batch": phase.batch, "length": phase.length}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- losses ---------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy with whole distributions (arXiv 1503.02531), by place: [...]."""
    return -(p * torch.log_softmax(logits.float(), -1)).sum(-1)


def next_token_loss(model: Llama, x: Tensor) -> Tensor:
    hidden, _ = model(x[:, :-1])
    return cross_entropy(model.logits(hidden), x[:, 1:])


@torch.no_grad()
def mean_held_out_loss(model: Llama, stream: Tensor) -> float:
    """Nats per token over fixed held-out windows of 512 tokens."""
    with in_bfloat16(stream.device):
        losses = [next_token_loss(model, windows(stream, -1 - i, 8, 512)) for i in range(8)]
    return float(torch.stack(losses).mean())


def distillation_loss(draft: Llama, target: Llama, x: Tensor) -> Tensor:
    """The draft against the target's whole distribution at every place."""
    with torch.no_grad():
        p = torch.softmax(target.logits(target(x)[0]).float(), -1)
    return soft_cross_entropy(draft.logits(draft(x)[0]), p).mean()


class OwnTexts(NamedTuple):
    """Texts that the target wrote, and what a head is given of them, on the device.

    tokens: [N, T]. greedy: [N], which were decoded greedily. features: [N, T, taps · width] and
    hidden: [N, T, width], in bfloat16. first: the first place that the target wrote.
    """

    tokens: Tensor
    greedy: Tensor
    features: Tensor
    hidden: Tensor
    first: int

    def rows(self, which: Tensor | slice) -> OwnTexts:
        parts = (part[which] for part in self[:4])
        return OwnTexts(*parts, self.first)

    def as_computed(self) -> OwnTexts:
        """The same in the type in which this device multiplies."""
        if self.tokens.is_cuda:
            return self
        return self._replace(features=self.features.float(), hidden=self.hidden.float())


@torch.no_grad()
def read(
    target: Llama, tokens: Tensor, greedy: Tensor, taps: tuple[int, ...], first: int
) -> OwnTexts:
    """Run the target over texts once: every update of a head asks for the same features."""
    width, rows = target.shape.width, tokens.shape
    kept = {"device": tokens.device, "dtype": torch.bfloat16}
    features = torch.empty(*rows, len(taps) * width, **kept)
    hidden = torch.empty(*rows, width, **kept)
    with in_bfloat16(tokens.device):
        for start in range(0, len(tokens), 64):
            batch = slice(start, start + 64)
            hidden[batch], seen = target(tokens[batch].long(), taps)
            features[batch] = torch.cat(seen, dim=-1)
    return OwnTexts(tokens, greedy, features, hidden, first)


def head_loss(head: nn.Module, target: Llama, texts: OwnTexts, step: int, count: int) -> Tensor:
    """A head's blocks at `count` random places of each text, of what the target wrote.

    A text that was decoded greedily has one right answer, its next tokens; the others have the
    target's distributions. Early tokens of a block weigh more, as a proposal ends with the first
    wrong one (arXiv 2602.06036).
    """
    generator = torch.Generator().manual_seed(SEED * 7_000_003 + step)
    texts = texts.as_computed()
    batch, length = texts.tokens.shape
    last = length - head.size + 1
    anchors = torch.randint(texts.first, last, (batch, count), generator=generator)
    anchors = anchors.to(texts.tokens.device)
    tokens, embedding = texts.tokens.long(), target.embed_tokens.weight
    places = anchors[..., None] + torch.arange(1, head.size, device=anchors.device)
    rows = torch.arange(batch, device=anchors.device)[:, None, None]
    first = embedding[tokens.gather(1, anchors)]
    out = head(texts.features, first, anchors, embedding[head.mask])[:, :, 1:]
    judged = target.logits(texts.hidden[rows, places - 1])
    return block_loss(target.logits(out), judged, tokens[rows, places], texts.greedy)


def block_loss(logits: Tensor, judged: Tensor, right: Tensor, greedy: Tensor) -> Tensor:
    """Logits [B, A, K, V] against the target's, `judged`, or the `right` tokens [B, A, K]."""
    soft = soft_cross_entropy(logits, torch.softmax(judged.float(), -1))
    hard = F.cross_entropy(logits.flatten(0, -2).float(), right.flatten(), reduction="none")
    weights = torch.exp(-torch.arange(right.shape[-1], device=right.device) / 4)
    losses = torch.where(greedy[:, None, None], hard.view_as(soft), soft)
    return (losses * (weights / weights.sum())).sum(-1).mean()


@torch.no_grad()
def kept_tokens(head: nn.Module, target: Llama, texts: OwnTexts, count: int) -> float:
    """Tokens of a block that a greedy round would keep of texts decoded greedily, on average."""
    texts = texts.rows(texts.greedy).as_computed()
    anchors = torch.linspace(texts.first, texts.tokens.shape[1] - head.size, count).long()
    anchors = anchors.to(texts.tokens.device).expand(len(texts.tokens), -1)
    tokens, embedding = texts.tokens.long(), target.embed_tokens.weight
    with in_bfloat16(anchors.device):
        first = embedding[tokens.gather(1, anchors)]
        out = head(texts.features, first, anchors, embedding[head.mask])[:, :, 1:]
        picks = target.logits(out).argmax(-1)
    places = anchors[..., None] + torch.arange(1, head.size, device=anchors.device)
    rows = torch.arange(len(tokens), device=anchors.device)[:, None, None]
    right = (picks == tokens[rows, places]).int().cumprod(-1)
    return float(right.sum(-1).float().mean())
