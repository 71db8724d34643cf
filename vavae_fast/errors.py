"""What a user can get wrong, which `cli.main` prints as one line with status 2; and the stop that a user asked for."""

from typing import Any


class BadInput(ValueError):
    """Wrong input. The message is one line: the culprit, what was found, what was expected, the cure."""


class Interrupted(Exception):
    """A signal ended the stage early; what it had is saved, and the same command continues. `cli.main` leaves with 0."""


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """Raise `BadInput` unless `condition`; `name` is a config key or a flag, `expected` reads on from 'must be'."""
    if not condition:
        raise BadInput(f"{name}: must be {expected}, got {found!r}")
