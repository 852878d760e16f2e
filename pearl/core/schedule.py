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
                                           them, and a pass verifies a tree (`core.control.controller` says how many)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

from pearl.core.token_buckets import LIMIT
from pearl.errors import UsageError
from pearl.options import Option, did_you_mean, refuse_unknown, renamed, whole

# mode: (pre_verify, post_verify, draft_batch)
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
MAX_DRAFT_BATCH = 16
MAX_AHEAD = 32
DECODING = "decoding"
GAMMA = Option("gamma", "auto", whole(0, MAX_GAMMA, auto=True), "guesses a block, or auto", DECODING)
DRAFT_BATCH = Option(
    "draft_batch",
    "auto",
    whole(1, MAX_DRAFT_BATCH, auto=True),
    "tree: rows of one drafter forward, or auto",
    DECODING,
    was=("branches",),
)
MAX_VERIFY_TOKENS = Option(
    "max_verify_tokens",
    "auto",
    whole(1, LIMIT, auto=True),
    "rows of a target pass at most, or auto",
    DECODING,
    was=("width",),
)
MAX_DRAFT_TOKENS = Option(
    "max_draft_tokens",
    "auto",
    whole(1, 1 << 20, auto=True),
    "how far a free-running drafter may guess ahead, or auto",
    DECODING,
    was=("max_ahead",),
)
OPTIONS = (GAMMA, DRAFT_BATCH, MAX_VERIFY_TOKENS, MAX_DRAFT_TOKENS)


def refuse_unknown_mode(mode: str, known: Sequence[str]) -> None:
    """Raises `UsageError` for a mode that is none of them."""
    if mode not in known:
        raise UsageError(f"There is no mode {mode!r}{did_you_mean(mode, known)} Choose from {', '.join(known)}.")


@dataclass(frozen=True)
class Schedule:
    """One mode. `gamma` None is `auto`: no block; as many guesses as have arrived (post-verify), or the block length
    that theory expects most of, from the acceptance and speed ratio seen so far (without post-verify). `draft_batch`,
    `max_verify_tokens`, `max_draft_tokens` None: the controller decides."""

    mode: str
    pre_verify: bool
    post_verify: bool
    gamma: int | None
    draft_batch: int | None  # leaves that one drafter forward extends; 0: no drafter
    max_verify_tokens: int | None = None  # rows of a pass at most
    max_draft_tokens: int | None = None  # guesses below the root at which a free-running drafter pauses

    @staticmethod
    def of(
        mode: str,
        gamma: int | str | None = None,
        draft_batch: int | str | None = None,
        max_verify_tokens: int | str | None = None,
        max_draft_tokens: int | str | None = None,
        **unknown: Never,
    ) -> Schedule:
        """The schedule of a mode by its name; `gamma` a whole number from 0, `"auto"` or None (auto).

        A name may carry a gamma of its own, as `sd:3`, so that one run can compare several; of `tree` it is the draft
        batch. gamma 0 is a block without guesses: the target alone. `draft_batch` is about `tree` only,
        `max_verify_tokens` and `max_draft_tokens` about every mode that drafts; each a whole number, `"auto"` or None
        (auto). Raises `UsageError` on anything else.
        """
        refuse_unknown(unknown, [one.name for one in OPTIONS], "Schedule.of", renamed(OPTIONS))
        mode, _, own = str(mode).partition(":")
        refuse_unknown_mode(mode, MODES)
        pre, post, leaves = _MODES[mode]
        block = _number(GAMMA, gamma if mode == "tree" else own or gamma)
        some = _number(DRAFT_BATCH, own if own and mode == "tree" else draft_batch)
        rows, ahead = _number(MAX_VERIFY_TOKENS, max_verify_tokens), _number(MAX_DRAFT_TOKENS, max_draft_tokens)
        if leaves is None:
            return Schedule(mode, pre, post, None, some, rows, ahead)
        if leaves == 0 or block == 0:
            return Schedule(mode, pre, post, 0, 0)
        return Schedule(mode, pre, post, block, leaves, rows, ahead)

    @property
    def drafts(self) -> bool:
        return self.draft_batch != 0

    def grows_trees(self, alone: bool) -> bool:
        """Whether a source that can grow trees does so. `alone`: one forward of it makes a tree anyhow, so that serial
        decoding takes the tree too."""
        return self.mode == "tree" or (alone and not (self.pre_verify or self.post_verify))

    def guesses_to_wait_for(self, hit: bool, gamma: int) -> int:
        """How many guesses below the root the target wants before it starts a pass.

        `hit`: the last walk ended on a node of the trie. `gamma`: the block length in force (the schedule's,
        or what `auto` came to). The wait also ends when the drafter says that no more will come.
        """
        if not self.drafts or (self.pre_verify and not hit):
            return 0  # pre-verify: after a miss the root is read at once, while its first guess is being drafted
        if self.gamma is None and self.post_verify:
            return 0 if self.pre_verify or hit else 1
        return gamma

    def room(self, depth: int, gamma: int, drafted: int, max_depth: int = MAX_AHEAD) -> int:
        """How many more guesses the drafter may add to its chain.

        `depth`: guesses below the root now; `drafted`: guesses made since the chain began, at the last miss or when it
        was used up. Post-verify drafts beyond what is being verified: the block under verification, its bonus
        token, and the next block; where there is no block, up to the schedule's `max_draft_tokens`, or else
        `max_depth`. Without it the drafter makes one block and waits for the verdict.
        """
        if not self.post_verify:
            return max(0, gamma - drafted)
        most = (self.max_draft_tokens or max_depth) if self.gamma is None else 2 * gamma + 1
        return max(0, most - depth)


def _number(setting: Option, value: int | str | None) -> int | None:
    """None is auto."""
    if value is None or value == "auto":
        return None
    found = setting.of_word(value, setting.name) if isinstance(value, str) else value
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    setting.check(found)
    assert isinstance(found, int)
    return found
