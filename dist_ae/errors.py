"""The errors that end a command with one message for a person, and its exit status."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


class InputError(Exception):
    """A mistake of the user's. The message says what is wrong, where, and the way out. Exit status 2.

    It is not a ValueError, which tyro and pydantic would catch and wrap in words of their own.
    """

    exit_status = 2


class Fault(Exception):
    """A fault that ends a run and is not the user's mistake, explained for a person. Exit status 1."""

    exit_status = 1


def install(extra: str) -> str:
    """The command that installs an extra: in a checkout from there, since its name may stand for nothing elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return shlex.join([sys.executable, "-m", "pip", "install", "-e", f"{checkout}[{extra}]"])
    return f'pip install "dist-ae[{extra}]"'
