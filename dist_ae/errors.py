"""The errors that end a command with one message for the user, and its exit status."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


class InputError(Exception):
    """The user's mistake. The message says what is wrong, where, and the way out. Exit status 2.

    It is not a ValueError, since tyro and pydantic would catch that and wrap it in other messages.
    """

    exit_status = 2


class Fault(Exception):
    """A fault that ends a run and is not the user's mistake, explained for the user. Exit status 1."""

    exit_status = 1


def install(extra: str) -> str:
    """The command that installs an extra, from the checkout if there is one."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return shlex.join([sys.executable, "-m", "pip", "install", "-e", f"{checkout}[{extra}]"])
    return f'pip install "dist-ae[{extra}]"'
