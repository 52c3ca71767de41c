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
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
END_OF_TEXT = "<|endoftext|>"
SEED = 20
CONTEXT = 1024
HELD_OUT_PERCENT = 4
# Tables of data rather than code: nothing in them can be learned.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "bad_coding"}
# Words with one leading character, short digit runs, punctuation runs, line ends, indentation.
# A line end is never part of the token before it: a prompt may well end just there.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


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


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` updates on `batch` windows of `length` tokens."""

    steps: int
    batch: int
    length: int


@dataclass(frozen=True)
class Corpus:
    train: list[Path]
    held_out: list[Path]
    root: Path

    @classmethod
    def of_standard_library(cls) -> Corpus:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.parts))
        files = [p for p in files if _readable(p)]
        return cls(
            [p for p in files if not _is_held_out(p.relative_to(root))],
            [p for p in files if _is_held_out(p.relative_to(root))],
            root,
        )


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def _is_held_out(relative: Path) -> bool:
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


# --- tokenizer and token streams ------------------------------------------------------------


def train_tokenizer(corpus: Corpus, vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p.read_text(encoding="utf-8") for p in corpus.train), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def token_stream(
    tokenizer: PreTrainedTokenizerFast, files: list[Path], cache: Path
) -> torch.Tensor:
    """All files' tokens in one int64 vector, each file closed by the end-of-text token.

    The library's own tests are half of its text; everything else counts twice.
    """
    if cache.exists():
        return torch.from_numpy(np.load(cache).astype(np.int64))
    order = [p for p in files for _ in range(1 if "test" in p.parts else 2)]
    random.Random(SEED).shuffle(order)
    ids: list[int] = []
    for path in order:
        ids += tokenizer.encode(path.read_text(encoding="utf-8")) + [tokenizer.eos_token_id]
    stream = np.array(ids, dtype=np.uint16)
    np.save(cache, stream)
    return torch.from_numpy(stream.astype(np.int64))


def windows(stream: torch.Tensor, step: int, batch: int, length: int) -> torch.Tensor:
    """`batch` random windows of `length + 1` tokens, a function of the seed and `step` alone."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
    return torch.stack([stream[s : s + length + 1] for s in starts.tolist()])


# --- training -------------------------------------------------------------------------------


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


def held_out_prompts(corpus: Corpus, count: int) -> list[dict[str, str]]:
    """`count` beginnings of 8–24 lines from held-out files, each from a place of its own."""
    rng = random.Random(SEED)
    prompts = []
    while len(prompts) < count:
        path = rng.choice(corpus.held_out)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        start, size = rng.randrange(len(lines)), rng.randint(8, 24)
        text = "".join(lines[start : start + size]).rstrip()
        if 200 <= len(text) <= 1200:
            prompts.append({"file": path.relative_to(corpus.root).as_posix(), "text": text})
    return prompts


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

    report = {
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
