"""Other libraries' warnings and progress bars, which would stand between our lines or fill a log.

Knows: who says what while it loads a model. All of it is as before afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Iterator

import transformers.modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging as transformers_logging

_BITSANDBYTES = logging.getLogger("bitsandbytes")  # warns when it is imported that an optional package is not there


_turn, _inside, _off = threading.Lock(), 0, contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While a model is read. Several threads may do so at once: the first turns all that off, the last on again."""
    global _inside
    with _turn:
        if not _inside:
            _off.enter_context(_silence())
        _inside += 1
    try:
        yield
    finally:
        with _turn:
            _inside -= 1
            if not _inside:
                _off.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The bar over the conversion of a GGUF file, which asks nobody, is left to terminals."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    level, bar = _BITSANDBYTES.level, gguf.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _BITSANDBYTES.setLevel(logging.ERROR)
    gguf.tqdm = functools.partial(bar, disable=None)  # None: unless it is a terminal
    try:
        with warnings.catch_warnings():  # of models without layers
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        gguf.tqdm = bar
        _BITSANDBYTES.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
