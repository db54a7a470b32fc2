"""The one error a user caused and can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input: the message is one sentence with what was found, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
