"""The one exception for what a user can get wrong. `cli.main` prints it as one line and exits with status 2."""

from typing import Any


class BadInput(ValueError):
    """Wrong input. The message is one line: the culprit, what was found, what was expected, the cure."""


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """Raise `BadInput` unless `condition`; `name` is a config key or a flag, `expected` reads on from 'must be'."""
    if not condition:
        raise BadInput(f"{name}: must be {expected}, got {found!r}")
