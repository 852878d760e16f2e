"""What a run of before was asked for, in the names of today: kept results stay comparable, and begun ones go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pearl.config import cli
from pearl.core.schedule import OPTIONS

_NAMES = {old: one.dest for one in cli.SHARED for old in one.was if one.name != "cuda_graphs"}
_NUMBERS = {one.dest for one in OPTIONS}  # were kept as they were written


def of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A kept config with today's names and values; what has them already comes back as it is."""
    made: dict[str, Any] = {
        _NAMES.get(name, name): of_today(value) if name == "resolved" and isinstance(value, dict) else value
        for name, value in config.items()
    }
    for name in _NUMBERS & made.keys():
        if isinstance(made[name], str) and made[name].isdigit():
            made[name] = int(made[name])
    if "static" in made or "eager" in made:
        static, eager = made.pop("static", "auto"), made.pop("eager", False)
        made["cuda_graphs"] = "static-only" if eager and static != "off" else static
    if "draft_vocabulary" in made and "resolved" in made:  # of a command line
        made["debug_draft_vocabulary"] = made.pop("draft_vocabulary")
    return made
