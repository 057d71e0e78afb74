"""`UserError`, and how commands end: one line on stderr and an exit code, without a traceback."""

import atexit
import contextlib
import errno
import functools
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from typing import NoReturn

# Errors of the system, not of the program: a full disk or quota, a file or folder that cannot be written.
SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
OTHERS_WAIT_SECONDS = 10.0  # the launcher ends the other processes once the first has ended
START_AGAIN = "run the same command again: it starts over, or tells you how to resume"
LAUNCHER_SECONDS = 3.0  # at most, until a launcher that Ctrl-C interrupts as well has printed its traceback

# What each running command, the innermost last, releases before and after its error is printed.
_endings: list[tuple[contextlib.ExitStack, contextlib.ExitStack]] = []


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and says what to do."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP, which ends a command with exit code 128 + its number, as in a shell."""

    def __init__(self, number: int, where: str = "", advice: str = START_AGAIN):
        super().__init__(f"stopped by {signal.Signals(number).name}{f' {where}' if where else ''}; {advice}")
        self.number = number


def at_end(release: Callable[[], object], after_error: bool = False) -> None:
    """Call `release` when the running command ends in any way: locks and signal handlers must not outlive it.

    It is called before the command's error is printed, or after it.
    """
    if _endings:
        _endings[-1][after_error].callback(release)
    else:
        atexit.register(release)


def _stop(message: str, code: int) -> NoReturn:
    """Print one line and exit. Of the processes of a machine only the first prints it, unless another fails alone."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(OTHERS_WAIT_SECONDS)
    logging.getLogger("transfer.run_log").info("error: %s", message)
    line = f"error: {message}"
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)
    sys.exit(code)


def _lost_a_process(fault: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone; gloo has no exception for that."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several and (type(fault).__name__.startswith("Dist") or "/gloo/" in str(fault))


def _let_launcher_end() -> None:
    """After Ctrl-C under `accelerate launch`, wait for its traceback: our line, which says what to do, comes last."""
    import psutil  # only here: errors are imported by everything

    launcher = os.getppid()
    try:
        if not any("accelerate" in word for word in psutil.Process(launcher).cmdline()):
            return
    except psutil.Error:
        return
    end = time.monotonic() + LAUNCHER_SECONDS
    while os.getppid() == launcher and time.monotonic() < end:
        time.sleep(0.02)
    print(file=sys.stderr)  # the shell's prompt has already come


def _own_words(mistake: UserError) -> str:
    """The line of an error; torch wraps one of a data worker into that worker's traceback."""
    text = str(mistake)
    return text.strip().rsplit("UserError: ", 1)[-1] if " in DataLoader worker process " in text else text


def _stop_early(number, frame) -> NoReturn:
    _let_launcher_end()
    _stop("interrupted", 130)


def announce(what: str) -> None:
    """Say in the first process what takes the first seconds; until `exits_cleanly` Ctrl-C ends them in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _stop_early)
    if os.environ.get("RANK", "0") == "0":
        print(f"starting    {what}", flush=True)


def _print_any_text() -> None:
    """Let names that the terminal's encoding lacks be printed as escapes, instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _refuse_name(fault: UnicodeEncodeError) -> NoReturn:
    """Stop because of a file name that is not valid UTF-8, which Python reads as lone surrogates."""
    if not any("\ud800" <= letter <= "\udfff" for letter in fault.object[fault.start : fault.end]):
        raise fault
    line = fault.object[max(0, fault.start - 80) : fault.end + 40].replace("\n", " ")
    shown = line.encode(errors="backslashreplace").decode()
    _stop(f"{shown}: the name of a file or folder is not valid UTF-8; rename it", 2)


def exits_cleanly(main):
    """Decorate a command so that a `UserError` ends it with one `error:` line on stderr and exit code 2.

    A full disk and a folder that cannot be written end it in the same way; Ctrl-C ends it with exit code 130, as in a
    shell, and SIGTERM and SIGHUP with 143 and 129. What `at_end` was given is then released.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        _print_any_text()
        with contextlib.ExitStack() as last:
            return run_until_error(last, *args, **kwargs)

    def run_until_error(last, *args, **kwargs):
        try:
            with contextlib.ExitStack() as ending:
                _endings.append((ending, last))
                ending.callback(_endings.pop)
                if signal.getsignal(signal.SIGINT) is _stop_early:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                return main(*args, **kwargs)
        except UserError as mistake:
            if isinstance(mistake.__context__, KeyboardInterrupt):
                _let_launcher_end()
            _stop(_own_words(mistake), 2)
        except Terminated as end:
            if int(os.environ.get("LOCAL_RANK", 0)):  # the first process says it, and needs a moment for it
                time.sleep(min(1.0, OTHERS_WAIT_SECONDS))
                sys.exit(128 + end.number)
            _stop(str(end), 128 + end.number)
        except KeyboardInterrupt:
            _let_launcher_end()
            _stop(f"interrupted; {START_AGAIN}", 130)
        except UnicodeEncodeError as fault:
            _refuse_name(fault)
        except RuntimeError as fault:
            if not _lost_a_process(fault):
                raise
            _stop("another process of this run has ended; its message says why", 2)
        except OSError as fault:
            if fault.errno not in SYSTEM_FAULTS:
                raise
            where = f"{fault.filename}: " if fault.filename else ""
            _stop(f"{where}cannot be written ({fault.strerror}); fix this and {START_AGAIN}", 2)

    return run
