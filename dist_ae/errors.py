"""The errors that end a command with one message for a person, and its exit status."""

from __future__ import annotations


class InputError(Exception):
    """A mistake of the user's. The message says what is wrong, where, and the way out. Exit status 2.

    It is not a ValueError, which tyro and pydantic would catch and wrap in words of their own.
    """

    exit_status = 2


class Fault(Exception):
    """A fault that ends a run and is not the user's mistake, explained for a person. Exit status 1."""

    exit_status = 1
