"""One exception for everything that a user can mend: the scripts print it as one line and exit with 2."""


class BlobError(ValueError):
    """A user's mistake or a missing resource. The message says what was wrong, what was found, what to do."""


class NonFiniteLossError(BlobError):
    """The training loss became NaN or infinite; raised before the optimizer could spoil the weights."""
