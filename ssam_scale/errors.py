"""The one exception that is meant for people rather than for programmers."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one line saying what was given, where, and what would work.

    The command line prints it without a traceback and exits with code 2.
    """
