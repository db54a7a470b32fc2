"""The errors of training: what a user caused and can mend, and what a run met on its way."""

__all__ = ["DamagedFileError", "InputError", "TrainingDivergedError", "WorkerLostError"]


class InputError(ValueError):
    """Bad input: the message is one sentence with what was found, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class DamagedFileError(InputError):
    """A file whose bytes are not the ones that were written; the message names the file."""


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names the step and its images."""


class WorkerLostError(RuntimeError):
    """Another of the processes that work together has ended; what was finished stays."""
