"""What can be wrong with what a user gave; each class says which exit code a program ends with."""


class MetricError(ValueError):
    """No such metric, or one whose declaration or code is not what was expected; the message says what to do."""

    exit_code = 2


class OptionError(ValueError):
    """A setting has a value that stands for nothing: a backend's name, a number of threads."""

    exit_code = 2


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here; the message says why."""

    exit_code = 2


class InvalidAttentionError(ValueError):
    """The input is no post-softmax attention: NaN, infinite or negative values, or rows that do not sum to 1."""

    exit_code = 2
