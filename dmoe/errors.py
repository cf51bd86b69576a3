"""The two kinds of failure a user sees as one line. Everything else is a bug and keeps its traceback."""


class DmoeError(Exception):
    """A failure with a message meant for the user; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DmoeError, ValueError):
    """The request is wrong: names the field and its value, and says what would be right."""

    exit_code = 2


class RunError(DmoeError, RuntimeError):
    """The request was right and the run failed: a full disk, a damaged checkpoint, a loss that is not finite."""
