"""Every decoding mode as a setting: when the target may start a pass, and how far ahead the drafter may run.

Knows: the two switches of PEARL (pre-verify, post-verify), the block length gamma, and the questions that the two role
loops ask. Refuses to know: tokens, tensors, messages, clocks. A schedule changes when things are done, never what is
written: the text is the target's in every mode.

    mode            pre   post  gamma      is
    ar, ar-all      -     -     0          the target alone (ar-all: on all the cores or devices that the others use)
    sd              no    no    n | auto   vanilla speculative decoding (Leviathan et al. 2023), serial
    pearl           yes   yes   n | auto   PEARL (Liu et al. 2025)
    pearl-no-pre    no    yes   n | auto   its ablation: after a miss the target waits for guesses
    pearl-no-post   yes   no    n | auto   its ablation: the drafter waits for the verdict
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pearl.errors import UsageError

# mode: (pre_verify, post_verify, drafts)
_MODES = {
    "ar": (False, False, False),
    "ar-all": (False, False, False),
    "sd": (False, False, True),
    "pearl": (True, True, True),
    "pearl-no-pre": (False, True, True),
    "pearl-no-post": (True, False, True),
}
MODES = tuple(_MODES)
MAX_GAMMA = 64


@dataclass(frozen=True)
class Schedule:
    """One mode. `gamma` None is `auto`: no block; as many guesses as have arrived (post-verify), or the block length
    that theory expects most of, from the acceptance and speed ratio seen so far (without post-verify)."""

    mode: str
    pre_verify: bool
    post_verify: bool
    gamma: int | None
    branches: int  # leaves that one drafter forward extends; 0: no drafter
    max_ahead: int = 32  # guesses below the root at which a free-running drafter pauses

    @staticmethod
    def of(mode: str, gamma: int | str | None = None) -> Schedule:
        """The schedule of a mode by its name; `gamma` a whole number from 0, `"auto"` or None (auto).

        A name may carry a gamma of its own, as `sd:3`, so that one run can compare several. gamma 0 is a block without
        guesses: the target alone. Raises `UsageError` on anything else.
        """
        mode, _, own = str(mode).partition(":")
        gamma = own or gamma
        if mode not in _MODES:
            near = difflib.get_close_matches(mode, MODES, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"There is no mode {mode!r}{hint} Choose from {', '.join(MODES)}.")
        block = _gamma(gamma)
        pre, post, drafts = _MODES[mode]
        drafts = drafts and block != 0
        return Schedule(mode, pre, post, block if drafts else 0, int(drafts))

    @property
    def drafts(self) -> bool:
        return self.branches > 0

    def guesses_to_wait_for(self, hit: bool, block: int) -> int:
        """How many guesses below the root the target wants before it starts a pass.

        `hit`: the last walk ended on a node of the trie. `block`: the block length in force (`gamma`, or what `auto`
        came to). The wait also ends when the drafter says that no more will come.
        """
        if not self.drafts or (self.pre_verify and not hit):
            return 0  # pre-verify: after a miss the root is read at once, while its first guess is being drafted
        if self.gamma is None and self.post_verify:
            return 0 if self.pre_verify or hit else 1
        return block

    def room(self, depth: int, block: int, drafted: int) -> int:
        """How many more guesses the drafter may add to its chain.

        `depth`: guesses below the root now; `drafted`: guesses made since the chain began, at the last miss or when it
        was used up. Post-verify drafts beyond what is being verified: the block under verification, its bonus
        token, and the next block. Without it the drafter makes one block and waits for the verdict.
        """
        if not self.post_verify:
            return max(0, block - drafted)
        return max(0, (self.max_ahead if self.gamma is None else 2 * block + 1) - depth)


def _gamma(gamma: int | str | None) -> int | None:
    if gamma is None or gamma == "auto":
        return None
    try:
        block = int(gamma)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"gamma must be a whole number from 0 to {MAX_GAMMA}, or auto, not {gamma!r}.") from None
    if not 0 <= block <= MAX_GAMMA or block != float(gamma):
        raise UsageError(f"gamma must be a whole number from 0 to {MAX_GAMMA}, or auto, not {gamma!r}.")
    return block
