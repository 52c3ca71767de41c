"""`mlxspec chat` with a model that says what it is told: `chatting.py SAYS OPTIONS…`.

SAYS is a JSON object with the options of `talkers.talker`, and its `replies`: the last digit of
a question says which of them answers it.
"""

from __future__ import annotations

import json
import sys

from talkers import talker

from mlxspec.cli import engines
from mlxspec.cli.app import main

if __name__ == "__main__":
    says = json.loads(sys.argv[1])
    replies = says.pop("replies")
    engines.load_engine = lambda *_, **__: talker(*replies, **says)
    sys.argv = ["mlxspec", "chat", "--no-compile", *sys.argv[2:]]
    main()
