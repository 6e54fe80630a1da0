"""Mistakes that a user can fix, told apart from bugs of the program."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user: its message is one sentence that says what to change."""


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
