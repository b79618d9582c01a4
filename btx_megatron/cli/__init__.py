"""``btx``: one subcommand a stage, no logic.

Answers that need no tensors (help, plan, status) must come at once, so nothing heavy is imported at the
top; what a command needs it imports itself. Exit codes and their meaning are in errors.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from btx_megatron.cli import runs, weights  # noqa: F401  (their commands)
from btx_megatron.cli.app import app
from btx_megatron.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StageFailed,
    Stopped,
    UserError,
)


def main() -> int:
    """The command line; returns the exit code."""
    try:
        app(prog_name="btx")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILURE
    except (UserError, StageFailed, Stopped) as error:
        for line in str(error).splitlines():
            print(f"btx: {line}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        if error.filename is None:
            raise
        print(f"btx: {error.filename}: {error.strerror}; ask its owner for access", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_STOPPED
    return EXIT_DONE


def entry() -> NoReturn:
    """``btx``: the command line, and the end of the process.

    Where torch was used the process ends at once: to take torch down in order takes up to half a second, and
    by then every file is closed and every thread has ended.
    """
    code = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
        if "torch" in sys.modules:
            os._exit(code)
    sys.exit(code)
