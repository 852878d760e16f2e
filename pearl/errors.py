"""What goes wrong, said in one sentence: what a user can put right, and what nobody here can."""

LONGEST = 2000  # characters of a sentence; it may repeat what it was given


class PearlError(Exception):
    """Whatever this package raises on purpose. The message is one sentence. Command-line entry points print it as
    ``error: ...`` on standard error."""

    def __init__(self, sentence: str):
        sentence = sentence.encode("utf-8", "backslashreplace").decode()  # what can't be printed is spelt out
        super().__init__(sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 3]}...")


class UsageError(PearlError, ValueError):
    """Input that cannot be carried out: the message is one sentence that says what is wrong and what to do.

    Raised before anything is loaded wherever that is possible. Command-line entry points exit with code 2.
    """


class WorkerLostError(PearlError, RuntimeError):
    """A process that an engine can't do without is gone: another rank of its target, or the launcher of them all.
    Command-line entry points exit with code 1."""


class CheckpointError(PearlError, ValueError):
    """The files of a model are there, but damaged, or not what they should be."""


class EngineClosedError(PearlError, RuntimeError):
    """The engine is closed: it writes nothing more."""


class StorageError(PearlError, OSError):
    """A file can't be written: the disk is full, or a folder is not for us."""


class Unreachable(Exception):
    """The drafter could not be reached this time; the message says why. Nobody but the runtime meets it."""


class NonFiniteLogits(PearlError, ArithmeticError):
    """A model's logits are not finite numbers (NaN or infinity), so they say nothing of the next token."""

    def __init__(self, dtype: object):
        """`dtype`: of the logits."""
        kind = str(dtype).removeprefix("torch.")
        advice = "use dtype bfloat16 or float32" if kind == "float16" else "check the weights, or use dtype float32"
        super().__init__(
            f"The logits are not finite (NaN or infinity), most likely for want of range in {kind}: {advice}."
        )
