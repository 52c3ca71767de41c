"""Rows that are sampled by unlike steps, in one graph that takes the steps of all of them."""

from __future__ import annotations

from mlxspec.params import Method, Windows


def union(one: Method, other: Method) -> Method | None:
    """The steps that rows of both kinds take side by side, or None where they cannot.

    A step that a row does not need leaves its scores as they are, to the last bit: see `knobs_of`.
    A greedy row is judged by its scores in any exact rule; relaxed rows share rounds with their
    like alone. So do rows of which XTC spares different tokens.
    """
    if one == other:
        return one
    rules = {one.rule, other.rule} - {"greedy"}
    relaxed = "relaxed" in rules and not (one.rule == other.rule and one.greedy == other.greedy)
    spared = {method.xtc_special_tokens for method in (one, other) if method.xtc}
    if len(rules) > 1 or len(spared) > 1 or relaxed:
        return None
    windows = zip(vars(one.windows).values(), vars(other.windows).values(), strict=True)
    return Method(
        rule=rules.pop() if rules else "greedy",
        greedy=one.greedy and other.greedy,
        windows=Windows(*map(max, windows)),
        bias=one.bias or other.bias,
        top_p=one.top_p or other.top_p,
        min_p=one.min_p or other.min_p,
        top_k=max(one.top_k, other.top_k),
        xtc=one.xtc or other.xtc,
        xtc_special_tokens=spared.pop() if spared else (),
        by_row=True,
    )
