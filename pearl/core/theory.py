"""What speculation can gain: expected speed-ups as functions of two numbers, with no model and no clock.

    a  acceptance: the chance that a guess is the target's own pick, the same for every guess and independent (i.i.d.)
    c  speed ratio: time of one target pass / time of one drafter forward, both in the same unit, so c has none

Time is counted in target passes. A pass costs 1 whatever its number of rows, a drafter forward costs 1/c, and a message
costs nothing. The baseline `ar` commits one token a pass, so a speed-up is also a number of tokens per pass-time.
Real acceptance is neither constant nor independent, rows are only nearly free and messages take time: these figures say
what to expect and what cannot be had. They decide no token. `docs/explanations/theory.md` holds the derivations.

`pearl theory` prints the table of that page.
"""

import math
from fractions import Fraction

from pearl.errors import UsageError

MOST_GAMMA = 16  # of the block lengths that `best_gamma` looks at
FINEST_PHASE = 64  # `speedup_pearl` rounds c to the nearest fraction whose denominator is at most this


def _check(a: float, c: float = 1.0, gamma: int = 0) -> None:
    """Refuse figures outside the model: one sentence, as a `UsageError`."""
    if not 0.0 <= a <= 1.0:
        raise UsageError(f"The acceptance a is a probability, so give a number from 0 to 1 (got {a}).")
    if not 0.0 < c < math.inf:
        raise UsageError(f"The speed ratio c is target pass time / drafter forward time, so give c > 0 (got {c}).")
    if gamma < 0:
        raise UsageError(f"A block holds gamma guesses, so give gamma >= 0 (got {gamma}).")


def tokens_per_pass_sd(a: float, gamma: int) -> float:
    """Expected tokens committed by one pass over `gamma` guesses: 1 + a + ... + a^gamma.

    The walk reaches guess i with chance a^i, and the last pick is committed too. So no guesses, or only wrong ones,
    still give 1 token, and a perfect drafter gives gamma + 1.
    Leviathan et al. 2023, equation 1: (1 - a^(gamma+1)) / (1 - a), whose limit at a = 1 is gamma + 1.
    """
    _check(a, gamma=gamma)
    if a == 0.0:
        return 1.0
    if a == 1.0:
        return gamma + 1.0
    return -math.expm1((gamma + 1) * math.log(a)) / (1.0 - a)  # expm1 keeps the digits that 1 - a^n loses near a = 1


def speedup_sd(a: float, c: float, gamma: int) -> float:
    """Expected speed-up over `ar` of lock-step speculative decoding (mode `sd`) with blocks of `gamma` guesses.

    A round drafts gamma guesses (time gamma/c), then verifies them (time 1); neither side works while the other does.
    Leviathan et al. 2023, theorem 3.8, with their cost coefficient equal to 1/c.
    """
    _check(a, c, gamma)
    return tokens_per_pass_sd(a, gamma) / (gamma / c + 1.0)


def best_gamma(a: float, c: float) -> int:
    """The block length, 1 to `MOST_GAMMA`, with the highest `speedup_sd`; the shortest one where several are equal.

    It is at least 1 even where speculation loses: some block gains exactly where a * c > 1 (corollary 3.9 there).
    """
    _check(a, c)
    return max(range(1, MOST_GAMMA + 1), key=lambda gamma: speedup_sd(a, c, gamma))


def tokens_per_pass_chain_ceiling(a: float) -> float:
    """Most tokens a pass that a chain can average if it restarts after every miss, however fast the drafter: 1/(1-a^2).

    Assumes a pass that starts at the moment of the miss, so that it runs the root alone; that its first guess, drafted
    meanwhile, is judged by the pass's pick (`pre_verify`); and that the bonus token of a pass is judged by the guess
    drafted beyond it (`post_verify`). From one miss to the next there are then 1/(1-a) tokens on average, and at least
    1 + a passes: the pass after the miss, and with chance a, if it did not miss again, another one. A target that waits
    after a miss until guesses have arrived breaks the first assumption, and has the ceiling `tokens_per_pass_ceiling`.
    """
    _check(a)
    return math.inf if a == 1.0 else 1.0 / ((1.0 - a) * (1.0 + a))


def tokens_per_pass_ceiling(a: float) -> float:
    """Most tokens a pass that one path can average if the continuation of every correction is ready: 1/(1-a).

    Each pass then runs until its next miss. Verifying several alternatives at a node goes beyond it: that raises a.
    """
    _check(a)
    return math.inf if a == 1.0 else 1.0 / (1.0 - a)


def speedup_pearl(a: float, c: float) -> float:
    """Expected speed-up over `ar` of free-running PEARL: mode `pearl`, gamma `auto`, one chain. 1.0 where c <= 1.

    The method is that of Liu et al. 2025; the model is ours, since the paper's blocks run in lock step:

    - The target starts a pass the moment the last one ends, over the root and every guess below it that has arrived.
    - The drafter runs forwards back to back, each from the newest leaf, without a bound on how far ahead. It has the
      verdict when the pass ends. If the new root is not in its chain (contradicted, or not drafted yet), the forward
      in flight is finished for nothing and the next one starts at the root.

    So the drafter's clock turns against the target's without regard to what is accepted: if a part x of a forward was
    done when a pass began, floor(x + c) forwards end during that pass. For c = p/q these counts repeat every q passes.
    Given the counts, what a pass holds depends only on how the last one ended, which makes three states:

        miss    no guesses to check, and the forward in flight is lost
        first   a hit after a `miss`: the forwards that ended in that pass, less the lost one, less the guess now root
        later   a hit after a hit: the forwards that ended in that pass, less the guess now root

    A pass with n guesses commits `tokens_per_pass_sd(a, n)` and ends in a hit if all n are right and so is the guess
    for its bonus: chance a^(n+1). The shares of the states are carried round the clock until a turn no longer changes
    them: no random numbers, no sampling error. c is rounded to a fraction of denominator `FINEST_PHASE` at most, and no
    forward is taken to end at the very moment a pass does: two real clocks never stay so exact.

    Worked example, c = 3, so 3 forwards end in every pass: a `miss` ends in a hit with chance a and leaves 3 - 2 = 1
    guess; that `first` hits with a^2 and leaves 3 - 1 = 2; that `later` hits with a^3 and leaves 2 again.
    """
    _check(a, c)
    ratio = Fraction(c).limit_denominator(FINEST_PHASE)
    if ratio <= 1:
        return 1.0  # no guess begun during a pass is ready before the pass that makes it needless
    p, q = ratio.numerator, ratio.denominator
    ended = [(k + 1) * p // q - k * p // q for k in range(q)]  # forwards that end in pass k of a turn: at least 1
    miss, first, later = 1.0, 0.0, 0.0
    while True:
        before, committed = (miss, first, later), 0.0
        for last, now in zip([ended[-1], *ended], ended, strict=False):
            committed += miss + later * tokens_per_pass_sd(a, last - 1)
            kept = later * a**last
            if first > 0.0:  # a hit after a miss took a guess, so last >= 2
                committed += first * tokens_per_pass_sd(a, last - 2)
                kept += first * a ** (last - 1)
            found = miss * a if now > 1 else 0.0
            miss, first, later = 1.0 - found - kept, found, kept
        if max(abs(x - y) for x, y in zip(before, (miss, first, later), strict=True)) < 1e-12:
            return committed / q


def table() -> str:
    """The figures of `docs/explanations/theory.md`, as a Markdown table."""
    lines = [
        "| a | c | best gamma | sd | pearl | 1/(1-a^2) | 1/(1-a) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for a in (0.3, 0.6, 0.8, 0.92):
        for c in (1.5, 2.6, 5.0, 10.0, 30.0):
            gamma = best_gamma(a, c)
            lines.append(
                f"| {a:.2f} | {c:.1f} | {gamma} | {speedup_sd(a, c, gamma):.2f} | {speedup_pearl(a, c):.2f} "
                f"| {tokens_per_pass_chain_ceiling(a):.2f} | {tokens_per_pass_ceiling(a):.2f} |"
            )
    return "\n".join(lines)
