"""Copying a text, with what the system has for it, or else by asking the terminal."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from typing import TextIO

_TOOLS = {
    "pbcopy": (),
    "wl-copy": ("WAYLAND_DISPLAY",),
    "xclip": ("DISPLAY",),
    "xsel": ("DISPLAY",),
}
_ARGUMENTS = {"xclip": ["-selection", "clipboard"], "xsel": ["--clipboard", "--input"]}
_PATIENCE_S = 5.0


def copy(text: str, terminal: TextIO) -> str:
    """Copy a text, and return who has it now, in words."""
    for tool, needed in _TOOLS.items():
        if shutil.which(tool) and all(os.environ.get(name) for name in needed):
            call = [tool, *_ARGUMENTS.get(tool, [])]
            try:
                # Its output goes nowhere: what it leaves running would keep a pipe open.
                subprocess.run(
                    call,
                    input=text.encode(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_PATIENCE_S,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError):
                continue
            return "the clipboard"
    # OSC 52, which also reaches the terminal of a person who is logged in from elsewhere.
    code = base64.b64encode(text.encode()).decode()
    terminal.write(f"\x1b]52;c;{code}\x07")
    terminal.flush()
    return "the terminal, whose settings decide whether it takes it"
