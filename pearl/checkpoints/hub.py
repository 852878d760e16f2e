"""Whether a hub can give a model, asked once and briefly: transformers asks six times and longer at each."""

from __future__ import annotations

import difflib

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from pearl.config.engine_config import ALIASES, SHIPPED
from pearl.config.inputs import brief
from pearl.config.pairs import all_pairs
from pearl.errors import UsageError

PATIENCE_S = 2.0  # that a hub may take for one short answer


def only_downloaded(role: str, name: str) -> bool:
    """Whether a model must come from what was downloaded before, as no hub answers. Raises `UsageError` if it can't."""
    try:
        here = isinstance(try_to_load_from_cache(name, "config.json"), str)
        if constants.HF_HUB_OFFLINE:
            why = "it was not downloaded before, and HF_HUB_OFFLINE says to ask no hub"
        else:
            HfApi().model_info(name, timeout=PATIENCE_S)
            return False
    except (RepositoryNotFoundError, HFValidationError):
        here, why = False, f"{constants.ENDPOINT} has no model of that name, or shows it only to those who may read it"
    except HfHubHTTPError:  # it answers: what is wrong with this model is for transformers to find out
        return False
    except Exception as error:  # of the HTTP library, which changes with the versions of the hub's
        why = (
            f"it was not downloaded before, and {constants.ENDPOINT} does not answer: {brief(error, 80)}; with "
            "HF_HUB_OFFLINE=1 no hub is asked"
        )
    if here:
        return True
    raise UsageError(
        f"The {role} {name} can't be read: give a hub id that this machine can reach, a folder or a GGUF file ({why})."
        f"{_nearest(name)}"
    )


def _nearest(name: str) -> str:
    known = {model for pair in all_pairs() for model in (pair.target, pair.draft)}
    known |= {folder.name for folder in SHIPPED.glob("*/")} | {*ALIASES}
    near = difflib.get_close_matches(name, sorted(known), 1, 0.8)
    return f" Did you mean {near[0]}?" if near and near[0] != name else ""
