"""One drafter of an engine that has several, to be looked at by itself."""

from __future__ import annotations

from copy import copy

from mlxspec.control.estimates import Learned
from mlxspec.decode.engine import Engine
from mlxspec.decode.maker import Maker
from mlxspec.decode.rounds import Rounds
from mlxspec.drafters.graph import GraphDrafter, ModelDrafter
from mlxspec.drafters.heads.head import HeadDrafter


def drafters_of(engine: Engine) -> tuple[str, ...]:
    """The names of all that draft: models, heads, and drafters of the text."""
    return (*engine.drafts, *engine.heads, *(make().name for make in engine.texts))


def alone(engine: Engine, name: str, *, compiled: bool | None = None) -> Engine:
    """The engine with one of its drafters, and no other.

    Its models are not tried again, which would take ten passes of each.

    Args:
        compiled: see `Engine`.
    """
    one = copy(engine)
    one.models, one.drafts, one.heads, one.texts = engine.models[:1], {}, {}, ()
    one.learned, one.prefixes = Learned(), None
    drafters: dict[str, GraphDrafter] = {}
    if name in engine.drafts:
        draft = engine.models[1 + list(engine.drafts).index(name)]
        one.models, one.drafts = [engine.models[0], draft], {name: engine.drafts[name]}
        context = one._draft_contexts.get(name)
        drafters[name] = ModelDrafter(draft, engine.models[0].vocabulary, context)
    elif name in engine.heads:
        one.heads = {name: engine.heads[name]}
        drafters[name] = HeadDrafter(engine.heads[name])
    else:
        one.texts = tuple(make for make in engine.texts if make().name == name)
    one.rounds = Rounds(one.models, drafters, from_text=bool(one.texts), compiled=compiled)
    one._maker = Maker(one)
    return one
