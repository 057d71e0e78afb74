"""What a fine-tuning run is made of, one noun a file."""

import errno
import functools
import sys

# The machine's faults rather than the program's: a full disk or quota, a folder that may not be written.
SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and says what to do."""


def exits_cleanly(main):
    """Decorate a command so that a `UserError` becomes one `error:` line on stderr and exit code 2.

    So do a full disk and a folder that may not be written; Ctrl-C becomes a line and exit code 130, as in a shell.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("error: interrupted; the same command starts again, or says how to go on", file=sys.stderr)
            sys.exit(130)
        except OSError as fault:
            if fault.errno not in SYSTEM_FAULTS:
                raise
            where = f"{fault.filename}: " if fault.filename else ""
            print(
                f"error: {where}cannot be written ({fault.strerror}); mend that, then repeat the command: it starts "
                "again, or says how to go on",
                file=sys.stderr,
            )
            sys.exit(2)

    return run
