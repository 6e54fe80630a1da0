"""Mistakes that a user can fix, told apart from bugs of the program."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake of the user: its message is one sentence that says what to change."""


def listed(items: Sequence[object], most: int = 8, separator: str = ", ") -> str:
    """At most `most` items for a message, and how many more there are."""
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*map(str, items[:most]), *rest])


def run_command(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError` becomes one line on standard error and exit status 1, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
