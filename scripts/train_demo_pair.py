#!/usr/bin/env python3
"""Train the embedded `demo` pair: a small target and a draft distilled from it.

The text is the Python standard library's own source (PSF licence), split by file into a part
that is trained on and a part that is held out. Every stage is seeded, writes its result into
the work folder and is skipped or resumed when that is there, so the script can be stopped at any
time and called again. It needs the `train` extra (PyTorch); nothing else in the project does.

    python scripts/train_demo_pair.py                  # both models, then the report
    python scripts/train_demo_pair.py --steps 500      # a shorter schedule

The stages: tokenizer, target (next-token loss), samples (the target's own continuations), draft
(distillation on text and on samples), export (Hugging Face folders in float32), report.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_pair_text import (
    CONTEXT,
    SEED,
    Corpus,
    held_out_prompts,
    token_stream,
    train_tokenizer,
    windows,
)
from demo_pair_training import Phase, logits_of, mean_held_out_loss, next_token_loss, train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """Size of one Llama model."""

    layers: int
    width: int
    heads: int
    key_heads: int
    hidden: int

    def config(self, vocab_size: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.width // self.heads,
            intermediate_size=self.hidden,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            attn_implementation="sdpa",
        )


# Many thin layers, because on a CPU an operation's overhead is paid once however many rows it
# verifies; two for the draft, the fewest that can copy what stands further up.
TARGET = Shape(layers=24, width=64, heads=2, key_heads=1, hidden=192)
DRAFT = Shape(layers=2, width=64, heads=2, key_heads=1, hidden=192)


def train_target(
    model: LlamaForCausalLM, text: torch.Tensor, held_out: torch.Tensor, steps: int, work: Path
) -> None:
    # The last part sees whole contexts, so that positions up to the end are known.
    long = steps // 16
    phases = [Phase(steps - long, batch=32, length=256), Phase(long, batch=8, length=CONTEXT)]
    fast = torch.compile(model, dynamic=False)
    train(
        "target",
        model,
        lambda step, p: next_token_loss(fast, windows(text, step, p.batch, p.length)),
        lambda: mean_held_out_loss(model, held_out),
        phases,
        peak=6e-3,
        checkpoint=work / "target.pt",
    )


# --- distillation ---------------------------------------------------------------------------


@torch.no_grad()
def sample_target(
    model: LlamaForCausalLM,
    text: torch.Tensor,
    count: int,
    cache: Path,
    *,
    prompt: int,
    length: int,
    greedy: float,
) -> torch.Tensor:
    """`count` rows of `length` tokens: `prompt` of a text and the target's continuation.

    The draft will be asked about what the target writes, which is not what people wrote. The
    share `greedy` of the rows is decoded greedily, the rest sampled at temperature 0.7.
    """
    if cache.exists():
        return torch.from_numpy(np.load(cache).astype(np.int64))
    rows: list[np.ndarray] = []
    batch = 256
    for i in range(count // batch):
        start = windows(text, -1_000_000 * length - i, batch, prompt - 1)
        torch.manual_seed(SEED + i)
        sampled = int((i + 1) * (1 - greedy)) > int(i * (1 - greedy))
        sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0} if sampled else {}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length - prompt,
                min_new_tokens=length - prompt,
                pad_token_id=0,
                **sampling,
            )
        rows.append(out.numpy().astype(np.uint16))
        print(f"{cache.stem} {len(rows) * batch}/{count}", flush=True)
    samples = np.concatenate(rows)
    np.save(cache, samples)
    return torch.from_numpy(samples.astype(np.int64))


def draft_from(target: LlamaForCausalLM, vocab_size: int) -> LlamaForCausalLM:
    """A draft that begins as the target's embedding, first and last layer, and final norm."""
    draft = LlamaForCausalLM(DRAFT.config(vocab_size))
    inner, outer = draft.model, target.model
    inner.embed_tokens.load_state_dict(outer.embed_tokens.state_dict())
    inner.norm.load_state_dict(outer.norm.state_dict())
    for mine, source in zip(inner.layers, (outer.layers[0], outer.layers[-1]), strict=True):
        mine.load_state_dict(source.state_dict())
    return draft


def distillation_loss(
    draft: torch.nn.Module, target: torch.nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the draft against the target's whole distribution (arXiv 1503.02531)."""
    with torch.no_grad():
        p = torch.softmax(logits_of(target, x), -1)
    return F.cross_entropy(logits_of(draft, x).flatten(0, 1), p.flatten(0, 1))


def train_draft(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM,
    text: torch.Tensor,
    held_out: torch.Tensor,
    arguments: argparse.Namespace,
) -> None:
    """Distil on text and on samples, then polish at a low rate on what the target writes."""
    fast_draft, fast_target = (torch.compile(m, dynamic=False) for m in (draft, target))
    work, count = arguments.work, arguments.samples

    def rows_of(samples: torch.Tensor, step: int, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED + step)
        return samples[torch.randint(0, len(samples), (batch,), generator=generator)]

    def stage(
        name: str, steps: int, length: int, rows: Callable[[int, Phase], torch.Tensor], peak: float
    ) -> None:
        train(
            name,
            draft,
            lambda step, p: distillation_loss(fast_draft, fast_target, rows(step, p)),
            lambda: mean_held_out_loss(draft, held_out),
            [Phase(steps, batch=16, length=length)],
            peak=peak,
            checkpoint=work / f"{name}.pt",
        )

    mixed = sample_target(
        target, text, count, work / "samples.npy", prompt=64, length=256, greedy=0.5
    )

    def text_or_sample(step: int, phase: Phase) -> torch.Tensor:
        if step % 2:
            return rows_of(mixed, step, phase.batch)
        return windows(text, step, phase.batch, phase.length - 1)

    stage("draft", arguments.draft_steps, 256, text_or_sample, peak=6e-3)
    own = sample_target(
        target, text, 2 * count, work / "greedy.npy", prompt=128, length=288, greedy=0.75
    )
    stage("polish", arguments.polish_steps, 288, lambda step, p: rows_of(own, step, p.batch), 2e-3)


# --- results --------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3400, help="updates of the target")
    parser.add_argument("--draft-steps", type=int, default=2400, help="updates of the draft")
    parser.add_argument("--polish-steps", type=int, default=2000, help="its last ones, at low rate")
    parser.add_argument("--samples", type=int, default=4096, help="rows of the target's own text")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "demo_pair")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "mlxspec" / "demo")
    return parser.parse_args()


def described(
    corpus: Corpus, text: torch.Tensor, held_out: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The circumstances of a training, for its report."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": SEED,
        "files": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "tokens": {"train": len(text), "held_out": len(held_out)},
        "steps": {
            "target": arguments.steps,
            "draft": arguments.draft_steps,
            "polish": arguments.polish_steps,
        },
    }


def main() -> None:
    arguments = parse_arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    corpus = Corpus.of_standard_library()
    tokenizer = train_tokenizer(corpus, arguments.vocab_size, work / "tokenizer")
    text = token_stream(tokenizer, corpus.train, work / "train.npy")
    held_out = token_stream(tokenizer, corpus.held_out, work / "held_out.npy")
    print(f"{len(corpus.train)} files, {len(text):,} tokens; {len(corpus.held_out)} held out")

    target = LlamaForCausalLM(TARGET.config(len(tokenizer)))
    print(f"target: {target.num_parameters():,} parameters")
    train_target(target, text, held_out, arguments.steps, work)
    draft = draft_from(target, len(tokenizer))
    print(f"draft: {draft.num_parameters():,} parameters")
    target.requires_grad_(False)
    train_draft(draft, target, text, held_out, arguments)

    report = described(corpus, text, held_out, arguments)
    for name, model, shape in (("target", target, TARGET), ("draft", draft, DRAFT)):
        loss = mean_held_out_loss(model, held_out)
        report[name] = {
            **asdict(shape),
            "parameters": model.num_parameters(),
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 3),
        }
        export(model, tokenizer, arguments.out / name)
    prompts = json.dumps(held_out_prompts(corpus, 64), indent=1)
    (REPOSITORY / "mlxspec" / "bench" / "held_out_prompts.json").write_text(prompts + "\n")
    results = REPOSITORY / "docs" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "demo_pair_training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
