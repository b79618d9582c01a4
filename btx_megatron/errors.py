"""What went wrong, where, and what to do next; and the exit codes that say so.

Every error that a user can cause is a ``UserError``: the command line prints it as one line,
without a traceback, and exits with 2. Anything else is a bug or a broken machine: traceback, 1.
"""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; run it again to go on


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what to do."""

    exit_code = EXIT_USER_ERROR


class StageFailed(Exception):
    """A stage ended with an error that is not the user's. The message names stage and log."""

    exit_code = EXIT_FAILURE


class Stopped(Exception):
    """A stop was asked for and the work is saved; running the same command again goes on."""

    exit_code = EXIT_STOPPED
