"""The draft sources that a config names, of the drafter's process and of the target's, each with its model loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pearl.config.engine_config import RECYCLING, SUFFIX, EngineConfig
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.recycling import RecyclingSource
from pearl.drafters.suffix import SuffixSource
from pearl.drafters.text_memory import TextMemory
from pearl.drafters.united import UnitedSource


def draft_source(config: EngineConfig, checked: Any = None) -> DraftSource:
    """What a config names, with its model loaded; several sources as one. `checked`: the config's preflight, if it was
    made."""
    sources = [SuffixSource() if name == SUFFIX else _checkpoint(config, checked) for name in config.draft_sources]
    return UnitedSource(sources) if len(sources) > 1 else sources[0]


def _checkpoint(config: EngineConfig, checked: Any) -> DraftSource:
    if config.synthetic:
        from pearl.drafters.synthetic import SyntheticSource

        return SyntheticSource(config.synthetic)
    # transformers takes seconds to import, and the suffix source does not need it
    from pearl.checkpoints.drafters import load_source
    from pearl.checkpoints.preflight import preflight

    return load_source(checked or preflight(config))


def sources_beside_target(config: EngineConfig, checked: Any, memory: TextMemory | None = None) -> list[DraftSource]:
    """Those that a config names for the target's own process. With a memory both keep what they know over texts."""
    kinds: dict[str, Callable[[], DraftSource]] = {
        SUFFIX: lambda: SuffixSource(memory=memory),
        RECYCLING: lambda: RecyclingSource(memory is not None),
    }
    return [kinds.get(name, partial(_beside, checked))() for name in config.sources_beside_target]


def _beside(checked: Any) -> DraftSource:
    from pearl.checkpoints.drafters import load_source

    return load_source(checked.of_beside())
