"""`python -m mlxspec.bench` names the measurements beside `mlxspec bench`, with their questions."""

from __future__ import annotations

from rich.console import Console

BENCHES = {
    "acceptance": "How many proposals of each drafter are kept, by kind of text?",
    "caches": "How much does taking proposals back cost, for each kind of cache?",
    "compiling": "How much does compiling a round gain, and how long does it take?",
    "following": "How much longer is a plain round beside a head that proposes nothing?",
    "heads": "How long is a round with a trained head, beside its bare forwards and a model's?",
    "joining": "How much of the time do texts take to join a batch and to leave it?",
    "load": "What becomes of a server's answers when many clients come, leave, and read slowly?",
    "long": "How much longer is a token, or a round, behind a long text?",
    "loops": "How many texts of a pair repeat themselves, and do its functions parse?",
    "scales": "How long is a token with quantised weights, by the type of their scales?",
    "serve": "How fast is `mlxspec serve`, beside `mlx_lm.server` on the same weights?",
    "turns": "How long does a chat wait for the first token of an answer, turn by turn?",
}


def main() -> None:
    console = Console(highlight=False)
    console.print("mlxspec bench", style="bold")
    console.print(
        "    Which setting is fastest here, for which kind of text, and how sure is that?"
    )
    for name, question in BENCHES.items():
        console.print(f"python -m mlxspec.bench.{name}", style="bold")
        console.print(f"    {question}")


if __name__ == "__main__":
    main()
