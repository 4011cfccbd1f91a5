"""Errors a user can act on."""


class InputError(Exception):
    """The job cannot do as asked: bad config, missing path, other schema version, mixed identity.

    The command line prints the message without a traceback and exits with 2. The message says what is wrong, where,
    what was expected, and what to do.
    """


class NoCompleteVersionError(InputError):
    """A table whose first run has not ended: it has rows, and no version to read."""


class ConcurrentRunError(Exception):
    """Another run, or another driver of the same run, committed first: this one stops, and nothing is doubled.

    The command line prints the message without a traceback and exits with 1: running again is all it takes.
    """
