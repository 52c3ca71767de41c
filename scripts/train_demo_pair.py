#!/usr/bin/env python3
"""Train the embedded `demo` pair: a small target, a draft distilled from it, and a DFlash head.

The text is Python source: the standard library (PSF licence), split by file into a part that is
trained on and a part that is held out, and the packages of `demo_pair_packages.txt` (BSD, MIT,
Apache and PSF licences). Every stage is seeded, writes its result into the work folder and is
skipped or resumed when that is there, so the script can be stopped at any time and called again.
It needs the `train` extra (PyTorch); nothing else in the project does.

    python scripts/train_demo_pair.py                  # all models, then the report
    python scripts/train_demo_pair.py --seconds 270    # no more than that for the target
    python scripts/train_demo_pair.py --only-text      # download the text and make tokens of it

The stages: tokens, target (next-token loss), samples (the target's own continuations), draft
(distillation on text and on samples), head (on samples), export (Hugging Face folders in float32),
report. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_pair_models import Head, Llama, Shape, described
from demo_pair_text import (
    CONTEXT,
    SEED,
    Corpus,
    library_texts,
    token_stream,
    train_texts,
    train_tokenizer,
    windows,
    write_prompts,
)
from demo_pair_training import (
    Phase,
    distillation_loss,
    head_loss,
    in_bfloat16,
    kept_tokens,
    mean_held_out_loss,
    next_token_loss,
    read,
    train,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent

# Many thin layers, because on a CPU an operation's overhead is paid once however many rows it
# verifies; two for the draft, the fewest that can copy what stands further up.
TARGET = Shape(layers=24, width=80, heads=2, head_size=64, hidden=224)
DRAFT = Shape(layers=2, width=80, heads=2, head_size=64, hidden=224)
HEAD = Shape(layers=4, width=80, heads=2, head_size=64, hidden=224)
TAPS = (1, 7, 12, 18, 23)
BLOCK = 8
PROMPT, LENGTH = 256, 448  # of the target's own texts
SAMPLED = 0.8  # temperature of half of them; the others are greedy
HELD_OUT = 256  # of them, which tell how good a head is


def compiled(model: nn.Module) -> None:
    """Compile a model's layers: all have one shape, so that one graph serves them."""
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of a batch
    for layer in model.layers:
        layer.compile(dynamic=False)


def train_target(model: Llama, text: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict:
    # The last part sees whole contexts, so that positions up to the end are known.
    batch = options.batch
    return train(
        "target",
        model,
        lambda step, p: next_token_loss(model, windows(text, step, p.batch, p.length)),
        lambda: mean_held_out_loss(model, held_out),
        Phase(options.steps, batch=batch, length=256),
        last=Phase(0, batch=max(1, batch // 4), length=CONTEXT),
        peak=6e-3,
        checkpoint=options.work / "target.pt",
        seconds=options.seconds,
    )


# --- distillation ---------------------------------------------------------------------------


def sample_target(model: Llama, text: Tensor, options: argparse.Namespace) -> Tensor:
    """Rows of `LENGTH` tokens: `PROMPT` of a text and the target's continuation.

    A drafter will be asked about what the target writes, which is not what people wrote. Rows of
    even number are decoded greedily, the others sampled.
    """
    cache = options.work / "samples.npy"
    if cache.exists():
        return torch.from_numpy(np.load(cache).astype(np.int32)).to(text.device)
    rows: list[Tensor] = []
    batch = min(options.samples, 4096 if text.is_cuda else 256)
    even = torch.arange(batch, device=text.device) % 2 == 0
    temperature = torch.where(even, 0.0, SAMPLED)
    for i in range(options.samples // batch):
        torch.manual_seed(SEED + i)
        start = windows(text, -1_000_000 - i, batch, PROMPT - 1)
        with in_bfloat16(text.device):
            rows.append(model.written(start, LENGTH, temperature).int())
        print(f"samples {len(rows) * batch}/{options.samples}", flush=True)
    samples = torch.cat(rows)
    np.save(cache, samples.cpu().numpy().astype(np.uint16))
    return samples


def some(count: int, step: int, batch: int) -> Tensor:
    """The numbers of `batch` random rows of `count`."""
    generator = torch.Generator().manual_seed(SEED + step)
    return torch.randint(0, count, (batch,), generator=generator)


def draft_from(target: Llama) -> Llama:
    """A draft that begins as the target's embedding, first and last layer, and final norm."""
    draft = Llama(DRAFT, target.embed_tokens.num_embeddings).to(target.embed_tokens.weight.device)
    draft.embed_tokens.load_state_dict(target.embed_tokens.state_dict())
    draft.norm.load_state_dict(target.norm.state_dict())
    for mine, source in zip(draft.layers, (target.layers[0], target.layers[-1]), strict=True):
        mine.load_state_dict(source.state_dict())
    return draft


def train_draft(
    draft: Llama,
    target: Llama,
    text: Tensor,
    held_out: Tensor,
    samples: Tensor,
    options: argparse.Namespace,
) -> dict:
    """Distil on text and on the target's own text in turns."""

    def loss(step: int, phase: Phase) -> Tensor:
        if step % 4:
            x = samples[some(len(samples), step, phase.batch).to(samples.device)].long()
        else:
            x = windows(text, step, phase.batch, phase.length - 1)
        return distillation_loss(draft, target, x)

    return train(
        "draft",
        draft,
        loss,
        lambda: mean_held_out_loss(draft, held_out),
        Phase(options.draft_steps, batch=options.batch // 2, length=LENGTH),
        peak=4e-3,
        checkpoint=options.work / "draft.pt",
        seconds=options.draft_seconds,
    )


def train_head(head: Head, target: Llama, samples: Tensor, options: argparse.Namespace) -> dict:
    """Train on the target's own texts; the first of them tell how good the head is."""
    even = torch.arange(len(samples), device=samples.device) % 2 == 0
    texts = read(target, samples, even, head.taps, PROMPT)
    print("features of all texts are read", flush=True)
    held_out, seen = texts.rows(slice(HELD_OUT)), texts.rows(slice(HELD_OUT, None))
    head.compile(dynamic=False)

    def loss(step: int, phase: Phase) -> Tensor:
        which = some(len(seen.tokens), step, phase.batch).to(samples.device)
        return head_loss(head, target, seen.rows(which), step, 24)

    def report() -> float:
        kept = kept_tokens(head, target, held_out, 24)
        print(f"head keeps {kept:.3f} of {head.size - 1} tokens", flush=True)
        head.export(options.out / "head", target, CONTEXT)
        with torch.no_grad(), in_bfloat16(samples.device):
            return float(head_loss(head, target, held_out, -1, 24))

    done = train(
        "head",
        head,
        loss,
        report,
        Phase(options.head_steps, batch=options.batch // 2, length=LENGTH),
        peak=4e-3,
        checkpoint=options.work / "head.pt",
        seconds=options.head_seconds,
    )
    return done | {"kept_of_a_block": round(kept_tokens(head, target, held_out, 24), 3)}


# --- results --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256, help="windows of an update")
    parser.add_argument("--steps", type=int, default=5000, help="updates of the target")
    parser.add_argument("--draft-steps", type=int, default=2500, help="updates of the draft")
    parser.add_argument("--head-steps", type=int, default=5000, help="updates of the head")
    for name in ("", "draft-", "head-"):
        parser.add_argument(f"--{name}seconds", type=float, help="fewer updates, to end in time")
    parser.add_argument("--samples", type=int, default=16384, help="rows of the target's own text")
    parser.add_argument("--only-text", action="store_true", help="stop after the tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "demo_pair")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "mlxspec" / "demo")
    report = REPOSITORY / "docs" / "results" / "demo_pair_training.json"
    parser.add_argument("--report", type=Path, default=report)
    options = parser.parse_args()
    if options.samples < 2 * HELD_OUT:
        parser.error(f"--samples is {options.samples}; give {2 * HELD_OUT} or more.")
    return options


def text_of(options: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Tensor, Tensor]:
    """The tokenizer, and the tokens to train on and those held out, on the device."""
    work = options.work
    if (work / "train.npy").exists() and (work / "held_out.npy").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        train_on, held_out = [], []
    else:
        corpus = Corpus.of_standard_library()
        tokenizer = train_tokenizer(corpus, options.vocab_size, work / "tokenizer")
        train_on = train_texts(corpus, work / "wheels")
        held_out = library_texts(corpus.held_out, often=2)
        write_prompts(corpus, REPOSITORY / "mlxspec/bench/prompts/beginnings.jsonl")
    text = token_stream(tokenizer, train_on, work / "train.npy")
    return tokenizer, text, token_stream(tokenizer, held_out, work / "held_out.npy")


def main() -> None:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer, text, held_out = text_of(options)
    print(f"{len(text):,} tokens; {len(held_out):,} held out", flush=True)
    if options.only_text:
        return
    device = torch.device(options.device)
    text, held_out = text.to(device), held_out.to(device)
    report: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if text.is_cuda else "cpu",
        "seed": SEED,
        "tokens": {"train": len(text), "held_out": len(held_out)},
    }

    target = Llama(TARGET, len(tokenizer)).to(device)
    compiled(target)
    done = train_target(target, text, held_out, options)
    report["target"] = described(target, TARGET) | done
    target.export(options.out / "target", CONTEXT)
    target.requires_grad_(False)
    samples = sample_target(target, text, options)

    head = Head(HEAD, TAPS, BLOCK, tokenizer.convert_tokens_to_ids("ÿ")).to(device)
    done = train_head(head, target, samples, options)
    report["head"] = described(head, HEAD) | done | {"taps": TAPS, "block": BLOCK}
    head.export(options.out / "head", target, CONTEXT)

    draft = draft_from(target)
    compiled(draft)
    done = train_draft(draft, target, text, held_out, samples, options)
    report["draft"] = described(draft, DRAFT) | done
    draft.export(options.out / "draft", CONTEXT)

    for name, model in (("target", target), ("draft", draft)):
        loss = mean_held_out_loss(model, held_out)
        report[name] |= {
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 3),
        }
        tokenizer.save_pretrained(options.out / name)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
