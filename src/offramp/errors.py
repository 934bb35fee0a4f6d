"""Every error that Offramp raises on purpose, as one tree.

    OfframpError                the user can mend it: bad input, file, option or machine
    |-- ConfigError             a configuration that is not supported or contradicts itself
    |-- CheckpointError         a checkpoint that is missing, truncated, corrupt or of another model
    |-- DataError               a data file that is missing or malformed
    |-- AudioError              a recording that is missing, not audio, truncated or not finite
    |-- TrainingError           a run that cannot go on, such as one whose loss is not a number
    `-- InputError              an argument out of range: a prompt, an exit layer, a temperature

A message says, in one line, what was wrong, what was given, what is allowed and what to do.
The command line prints it without a traceback and exits with status 2. Our own bugs are
`AssertionError`s and keep their traceback.
"""


class OfframpError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(OfframpError):
    """A configuration that is not supported or contradicts itself."""


class CheckpointError(OfframpError):
    """A checkpoint that is missing, truncated, corrupt or made by another model."""


class DataError(OfframpError):
    """A data file that is missing or malformed."""


class AudioError(OfframpError):
    """A recording that is missing, not audio, truncated or holds numbers that are not finite."""


class TrainingError(OfframpError):
    """A training run that cannot go on."""


class InputError(OfframpError):
    """An argument that is out of range or of the wrong kind."""


def first_line(error: BaseException) -> str:
    """Of what an error of another library says; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
