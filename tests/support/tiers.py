"""Which of a test's parameters belong to the quick tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tiered(values: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """For `pytest.mark.parametrize`: those of which `quick` does not hold are marked as slow."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if quick(value) else [pytest.mark.slow]
        )
        for value in values
    ]
