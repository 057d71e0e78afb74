"""What a fine-tuning run is made of, one noun a file."""

import functools
import sys


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and says what to do."""


def exits_cleanly(main):
    """Decorate a command so that a `UserError` becomes one `error:` line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            sys.exit(2)

    return run
