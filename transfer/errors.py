"""What a fine-tuning run is made of, one noun a file."""

import errno
import functools
import os
import sys
import time
from typing import NoReturn

# The machine's faults rather than the program's: a full disk or quota, a folder that may not be written.
SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
FIRST_SPEAKS = 10.0  # seconds; the launcher ends all processes of a machine once one has ended


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and says what to do."""


def _stop(message: str, code: int) -> NoReturn:
    """End with one line. Of a machine's processes the first says it; another does only where it fails alone."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(FIRST_SPEAKS)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _lost_a_process(fault: RuntimeError) -> bool:
    """Whether a collective failed since another process is gone: gloo raises no type of its own."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several and (type(fault).__name__.startswith("Dist") or "/gloo/" in str(fault))


def exits_cleanly(main):
    """Decorate a command so that a `UserError` becomes one `error:` line on stderr and exit code 2.

    So do a full disk and a folder that may not be written; Ctrl-C becomes a line and exit code 130, as in a shell.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as mistake:
            _stop(str(mistake), 2)
        except KeyboardInterrupt:
            _stop("interrupted; the same command starts again, or says how to go on", 130)
        except RuntimeError as fault:
            if not _lost_a_process(fault):
                raise
            _stop("another process of this run has ended; its own message says why", 2)
        except OSError as fault:
            if fault.errno not in SYSTEM_FAULTS:
                raise
            where = f"{fault.filename}: " if fault.filename else ""
            _stop(
                f"{where}cannot be written ({fault.strerror}); mend that, then repeat the command: it starts "
                "again, or says how to go on",
                2,
            )

    return run
