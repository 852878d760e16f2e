"""What a run notes of its surroundings."""

from __future__ import annotations

from importlib.metadata import version

from pearl.evaluation.measures.environment import _versions


def test_a_package_that_is_not_installed_has_no_version_and_ends_no_run():
    assert _versions("torch", "no-such-package") == {"torch": version("torch")}
