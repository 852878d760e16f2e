"""What other libraries say is as before, whoever loads a model beside whom."""

from __future__ import annotations

import threading

import transformers.modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging as theirs

from pearl.checkpoints.quiet import quiet


def state() -> tuple[object, ...]:
    return theirs.get_verbosity(), theirs.is_progress_bar_enabled(), gguf.tqdm


def test_two_threads_that_load_at_once_leave_verbosity_and_bars_as_they_were():
    before, first_is_in, second_is_in, first_is_out = state(), *(threading.Event() for _ in range(3))

    def first() -> None:
        with quiet():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with quiet():
        second_is_in.set()
        first_is_out.wait(10)
        assert state()[:2] == (theirs.ERROR, False), "it is still quiet for the second"
    thread.join()
    assert state() == before
