"""Tries every architecture of the installed mlx-lm, and writes docs/architectures.md.

    scripts/architectures            all of them, and the page
    scripts/architectures NAME …     some, without the page

A tiny random model of each decodes 300 tokens plainly with mlx-lm; the same text is then asked of
mlxspec with a draft that always agrees, one that half agrees and one of another architecture.
Where texts differ, an audit tells rounding from an error. Ends with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode.engine import Engine
from mlxspec.decode.run import Run
from mlxspec.device.kernels import on_cpu
from mlxspec.errors import UnsupportedModel
from mlxspec.measure.audit import audit
from mlxspec.models.cached_model import cached_model_of

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "architectures.md"
TABLE: dict[str, dict[str, Any]] = json.loads((HERE / "architectures.json").read_text())
# Modules beside the models' own that have no model in them.
PARTS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}
VOCABULARY = 64
PROMPT = 20
TOKENS = 300


def build(name: str, *, vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of an architecture, its weights large enough for a text without loops.

    Args:
        changes: to its configuration in the table.
    """
    entry = TABLE[name]
    module = import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **entry["config"], **changes}
    _set_vocabulary(config, entry.get("vocabulary", vocabulary))
    mx.random.seed(seed)  # of what a model draws for itself
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = []
    for path, array in tree_flatten(model.parameters()):
        if not mx.issubdtype(array.dtype, mx.floating):
            continue  # packed weights stay as they are
        noise = rng.normal(size=array.shape)
        if "embed" in path or "wte" in path:
            value = noise * entry.get("embedding_scale", 1.0)
        elif array.ndim < 2:
            value = np.array(array.astype(mx.float32)) + 0.2 * noise
        else:
            value = noise * 2.0 * array.shape[-1] ** -0.5
        weights.append((path, mx.array(value, mx.float32)))
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _set_vocabulary(config: dict[str, Any], vocabulary: int) -> None:
    """In a configuration, or in those of its parts that have one."""
    for key, value in config.items():
        if key == "vocab_size":
            config[key] = vocabulary
        elif isinstance(value, dict) and "vocab_size" in value:
            config[key] = {**value, "vocab_size": vocabulary}


class Contrary(nn.Module):
    """A model whose logits are negated after some of its input tokens."""

    def __init__(self, inner: Any, every: int) -> None:
        super().__init__()
        self.inner = inner
        self.every = every

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        return mx.where((tokens % self.every == 0)[..., None], -logits, logits)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


@dataclass(frozen=True)
class Result:
    """What came of an architecture.

    path: "fused", "hosted", "refused", or "mlx-lm cannot". why: unless it is fused.
    differs: what went wrong, or empty.
    """

    name: str
    caches: tuple[str, ...]
    path: str
    why: str = ""
    differs: str = ""


def names() -> list[str]:
    """Every model file of the installed mlx-lm."""
    found = {module.name for module in iter_modules(mlx_lm.models.__path__)}
    return sorted(found - PARTS, key=str.lower)


def attempt(name: str, tokens: int = TOKENS) -> Result:
    """Decode with an architecture on every path there is, and compare."""
    if name not in TABLE:
        return Result(name, (), "untried", "it has no tiny configuration yet", "untried")
    if "cannot" in TABLE[name]:
        return Result(name, (), "mlx-lm cannot", TABLE[name]["cannot"])
    model = build(name)
    caches = tuple(dict.fromkeys(_kinds(make_prompt_cache(model))))
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, PROMPT).tolist()
    expected = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens)]
    other = build("lfm2" if name == "llama" else "llama")
    drafts = {
        "no draft": (None, 0),
        "a draft that agrees": (model, 4),
        "a draft that half agrees": (Contrary(model, 3), 3),
        "a draft of another architecture": (other, 2),
    }
    cached = cached_model_of(model)
    path, why, differs = "fused" if cached.fused else "hosted", cached.obstacle, []
    for what, (draft, count) in drafts.items():
        try:
            engine = Engine(model, draft, draft_tokens=count)
        except UnsupportedModel as error:
            path, why = "refused", error.message
            continue
        run = engine.run(prompt, max_tokens=tokens)
        for _ in run:
            pass
        if run.generation.tokens != expected and (error := _judged(engine, run)):
            differs.append(f"{what}: {error}")
    return Result(name, caches, path, why, "; ".join(differs))


def _kinds(caches: Sequence[Any]) -> list[str]:
    return [
        kind
        for cache in caches
        for kind in (_kinds(cache.caches) if hasattr(cache, "caches") else [type(cache).__name__])
    ]


def _judged(engine: Engine, run: Run) -> str:
    """What an audit says to a text that differs; nothing where it was rounding."""
    found = audit(engine, run)
    return "" if found.outcome == "rounding tie" else found.described(str)


def page(results: Sequence[Result]) -> str:
    """The page, in Markdown."""
    tried = [result for result in results if result.path != "mlx-lm cannot"]
    exact = [
        result for result in tried if result.path in ("fused", "hosted") and not result.differs
    ]
    lines = [
        "# Architectures",
        "",
        "Written by `scripts/architectures`, which decodes "
        f"{TOKENS} tokens with a tiny random float32 model of every model file of "
        f"mlx-lm {version('mlx-lm')} (MLX {version('mlx')}, {_machine()}), plainly with mlx-lm and "
        "with mlxspec: without a draft, and with drafts that always agree, half agree, and are of "
        "another architecture. *Exact* is the same token at every place; *alone*, without a draft.",
        "",
        f"**{len(exact)} of {len(tried)}** that mlx-lm itself decodes are exact: "
        f"{sum(result.path == 'fused' for result in exact)} fused, one graph that never waits for "
        f"the host, and {sum(result.path == 'hosted' for result in exact)} on mlx-lm's own caches, "
        "which are copied before a round and read again where a proposal was rejected.",
        "",
        "| architecture | mlx-lm's caches | exact | path |",
        "|---|---|---|---|",
    ]
    for result in results:
        if result in tried:
            path = result.path if result.path == "fused" else f"{result.path}: {result.why}"
            verdict = "alone" if result.path == "refused" else "yes"
            verdict = f"no: {result.differs}" if result.differs else verdict
            caches = ", ".join(f"`{cache}`" for cache in result.caches)
            lines.append(f"| {result.name} | {caches} | {verdict} | {path} |")
    lines += ["", "Not tried, because mlx-lm itself does not decode them:", ""]
    lines += [f"- {result.name}: {result.why}" for result in results if result not in tried]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them, if none is given")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="per text")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    given = parser.parse_args()
    wanted = given.names or names()
    results = []
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(_attempted, wanted, [given.tokens] * len(wanted)):
            print(f"{result.name:24} {result.path:14} {result.why} {result.differs}", flush=True)
            results.append(result)
    if not given.names:
        PAGE.write_text(page(results))
    wrong = [result.name for result in results if result.differs]
    print(f"{len(results)} tried, {len(wrong)} differ{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


def _attempted(name: str, tokens: int) -> Result:
    try:
        return attempt(name, tokens)
    except Exception as error:  # one architecture must not end the others
        return Result(name, (), "failed", "", f"{type(error).__name__}: {error}")


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, CPU" if on_cpu() else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
