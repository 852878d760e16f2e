"""What tests of drafters share."""

from __future__ import annotations

import pytest

from pearl.models import timing


@pytest.fixture(scope="module")
def hurried():
    """For tests in which nothing depends on how long a forward takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TIMED", (8, 1))
        yield
