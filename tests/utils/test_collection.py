"""Garbage collection is paused in a block, and goes on behind it as it was."""

from __future__ import annotations

import gc

import pytest

from hf_sparse.utils.collection import collection_paused


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), collection_paused():
        1 / int(gc.isenabled())
    assert gc.isenabled()


def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
