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
    tree            yes   yes   auto       ours: one drafter forward extends several leaves, likely corrections among
                                           them, and a pass verifies a tree (`pearl.core.controller` says how many)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pearl.errors import UsageError

# mode: (pre_verify, post_verify, branches)
_MODES: dict[str, tuple[bool, bool, int | None]] = {
    "ar": (False, False, 0),
    "ar-all": (False, False, 0),
    "sd": (False, False, 1),
    "pearl": (True, True, 1),
    "pearl-no-pre": (False, True, 1),
    "pearl-no-post": (True, False, 1),
    "tree": (True, True, None),
}
MODES = tuple(_MODES)
MAX_GAMMA = 64
MAX_BRANCHES = 16
MAX_WIDTH = 16
MAX_AHEAD = 32


@dataclass(frozen=True)
class Schedule:
    """One mode. `gamma` None is `auto`: no block; as many guesses as have arrived (post-verify), or the block length
    that theory expects most of, from the acceptance and speed ratio seen so far (without post-verify). `branches`,
    `width`, `max_ahead` None: the controller decides."""

    mode: str
    pre_verify: bool
    post_verify: bool
    gamma: int | None
    branches: int | None  # leaves that one drafter forward extends; 0: no drafter
    width: int | None = None  # rows of a pass at most
    max_ahead: int | None = None  # guesses below the root at which a free-running drafter pauses

    @staticmethod
    def of(
        mode: str,
        gamma: int | str | None = None,
        branches: int | str | None = None,
        width: int | str | None = None,
        max_ahead: int | str | None = None,
    ) -> Schedule:
        """The schedule of a mode by its name; `gamma` a whole number from 0, `"auto"` or None (auto).

        A name may carry a gamma of its own, as `sd:3`, so that one run can compare several; of `tree` it is the number
        of branches. gamma 0 is a block without guesses: the target alone. `branches` is about `tree` only, `width` and
        `max_ahead` about every mode that drafts; each a whole number, `"auto"` or None (auto). Raises `UsageError` on
        anything else.
        """
        mode, _, own = str(mode).partition(":")
        if mode not in _MODES:
            near = difflib.get_close_matches(mode, MODES, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"There is no mode {mode!r}{hint} Choose from {', '.join(MODES)}.")
        pre, post, leaves = _MODES[mode]
        block = _number("gamma", gamma if mode == "tree" else own or gamma, 0, MAX_GAMMA)
        some = _number("branches", own if own and mode == "tree" else branches, 1, MAX_BRANCHES)
        rows = _number("width", width, 1, MAX_WIDTH)
        ahead = _number("max_ahead", max_ahead, 1, 1 << 20)
        if leaves is None:
            return Schedule(mode, pre, post, None, some, rows, ahead)
        if leaves == 0 or block == 0:
            return Schedule(mode, pre, post, 0, 0)
        return Schedule(mode, pre, post, block, leaves, rows, ahead)

    @property
    def drafts(self) -> bool:
        return self.branches != 0

    @property
    def tree(self) -> bool:
        """Whether guesses may branch and the drafter guesses for itself; else they are one chain."""
        return self.mode == "tree"

    def grows_trees(self, whole: bool) -> bool:
        """Whether a source that can grow trees does so. `whole`: one forward of it makes a tree anyhow, so that serial
        decoding takes the tree too."""
        return self.tree or (whole and not (self.pre_verify or self.post_verify))

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

    def room(self, depth: int, block: int, drafted: int, ahead: int = MAX_AHEAD) -> int:
        """How many more guesses the drafter may add to its chain.

        `depth`: guesses below the root now; `drafted`: guesses made since the chain began, at the last miss or when it
        was used up. Post-verify drafts beyond what is being verified: the block under verification, its bonus
        token, and the next block; where there is no block, up to `ahead`. Without it the drafter makes one block and
        waits for the verdict.
        """
        if not self.post_verify:
            return max(0, block - drafted)
        return max(0, (self.max_ahead or ahead if self.gamma is None else 2 * block + 1) - depth)


def _number(name: str, value: int | str | None, least: int, most: int) -> int | None:
    if value is None or value == "auto":
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} must be a whole number from {least} to {most}, or auto, not {value!r}.") from None
    if not least <= number <= most or number != float(value):
        raise UsageError(f"{name} must be a whole number from {least} to {most}, or auto, not {value!r}.")
    return number
