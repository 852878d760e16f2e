"""What is measured of models that will be gone is gone with them."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None: ...
