"""One draft of an engine that has several, to be looked at by itself."""

from __future__ import annotations

from copy import copy

from mlxspec.control.estimates import Learned
from mlxspec.decode.engine import Engine
from mlxspec.decode.maker import Maker
from mlxspec.decode.rounds import Rounds
from mlxspec.drafters.graph import ModelDrafter


def alone(engine: Engine, name: str) -> Engine:
    """The engine with one of its draft models, and no other drafter.

    Its models are not tried again, which would take ten passes of each.
    """
    one = copy(engine)
    target, draft = engine.models[0], engine.models[1 + list(engine.drafts).index(name)]
    one.models, one.drafts = [target, draft], {name: engine.drafts[name]}
    one.heads, one.texts, one.learned = {}, (), Learned()
    one.prefixes = None
    drafter = ModelDrafter(draft, target.vocabulary, one._draft_contexts.get(name))
    one.rounds = Rounds(one.models, {name: drafter}, from_text=False, compiled=engine.compiles)
    one._maker = Maker(one)
    return one
