"""The moving average of what is observed again and again, all that the controllers keep of most figures."""

from __future__ import annotations


def ema(old: float, new: float, *, weight: float) -> float:
    """The exponential moving average after one more value, which has this weight in it."""
    return old + weight * (new - old)
