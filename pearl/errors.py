"""What a user can get wrong, said in one sentence."""


class UsageError(Exception):
    """Input that cannot be carried out: the message is one sentence that says what is wrong and what to do.

    Raised before anything is loaded wherever that is possible. Command-line entry points print it as ``error: ...`` on
    standard error and exit with code 2; a Python caller catches it like any exception.
    """
