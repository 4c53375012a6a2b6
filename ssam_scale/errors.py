"""The exceptions that are meant for people rather than for programmers."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one line saying what was given, where, and what would work.

    The command line prints it without a traceback and exits with code 2.
    """


class NotFiniteError(UserError):
    """A loss, or a weight that was to be saved, is not finite, on all processes alike."""


class UnsupportedVersionError(UserError, ImportError):
    """A library that is there is of a version that this package does not work with."""


class RankLostError(Exception):
    """Another process of the job is gone or does not come: the message is one line that names it.

    The command line prints it without a traceback and exits with code 1.
    """
