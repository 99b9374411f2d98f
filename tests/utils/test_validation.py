"""Checks of options: what passes, and the one form of what is said of the rest."""

import re
from collections import UserDict

import pytest
import torch

from hf_sparse.errors import CheckpointError, RecipeError
from hf_sparse.utils import validation
from hf_sparse.utils.validation import check_integer, check_number, is_integer, is_number

NOT_NUMBERS = (True, "1", None, float("nan"), float("inf"), -float("inf"), [1], 10**400)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:8])
def test_what_is_not_a_finite_number_is_refused(value):
    assert not is_number(value)
    with pytest.raises(RecipeError, match=r"`rate` must be a (finite )?number.*, got "):
        check_number("rate", value)
    with pytest.raises(RecipeError, match=r"`rate` must be a number in \(0, 1\), got "):
        check_number("rate", value, "(0, 1)")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 1, 0.5), (-1e-9, 1.001)),
        ("[0, 1)", (0, 0.999), (1, 1.0, -1)),
        ("(0, 1]", (1, 1e-300), (0, 0.0, -0.0)),
        ("(0, 1)", (0.5,), (0, 1)),
        ("(0, inf)", (1e300, 5), (0, -5)),
        ("[0, 2**32)", (), ()),
    ],
)
def test_interval_means_what_mathematics_means(interval, inside, outside):
    if not inside:
        with pytest.raises(ValueError, match="could not convert"):
            check_number("x", 1, interval)
    for value in inside:
        check_number("x", value, interval)
    for value in outside:
        with pytest.raises(RecipeError, match=re.escape(f"`x` must be in {interval}, got {value}")):
            check_number("x", value, interval)


def test_interval_that_is_none_is_our_mistake():
    with pytest.raises(ValueError, match="is not an interval"):
        check_number("x", 1, "0..1")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 4])
def test_integer_outside_is_refused(value):
    with pytest.raises(RecipeError, match=r"`n` must be an integer in \[0, 4\), got "):
        check_integer("n", value, "[0, 4)")


def test_integer_may_be_longer_than_any_float():
    assert is_integer(10**400)
    check_integer("n", 10**400)
    with pytest.raises(RecipeError, match="got an integer of 1329 bits"):
        check_integer("n", 10**400, "[0, 4)")


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        ("check_positive_int", 0, "`x` must be a positive integer, got 0"),
        ("check_positive_int", True, "`x` must be a positive integer, got True"),
        ("check_positive_int", 1.0, "`x` must be a positive integer, got 1.0"),
        ("check_bool", 1, "`x` must be true or false, got 1"),
        ("check_text", "", "`x` must be a non-empty string, got ''"),
        ("check_text", 1, "`x` must be a string, got 1"),
        ("check_mapping", "a", "`x` must be a mapping, got 'a'"),
    ],
)
def test_message_has_option_demand_and_value(check, value, message):
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        getattr(validation, check)("x", value, CheckpointError)


@pytest.mark.parametrize(
    ("check", "value"),
    [("check_positive_int", 1), ("check_bool", False), ("check_text", "a"), ("check_mapping", {})],
)
def test_right_value_passes(check, value):
    assert getattr(validation, check)("x", value) is None


def test_one_of_lists_the_choices():
    validation.check_one_of("x", "a", ["a", "b"])
    with pytest.raises(RecipeError, match="`x` must be one of 'a', 'b', got 'c'"):
        validation.check_one_of("x", "c", ["a", "b"])


@pytest.mark.parametrize("batches", [{"x": 1}, "ab", 5, None, torch.ones(2, 2), [torch.ones(2)], ["ab"], [{"x": 1}, 2]])
def test_what_cannot_be_batches_is_refused(batches):
    with pytest.raises(RecipeError, match=r"`batches` must be a list of mappings, .*, got .*: \[batch\]"):
        validation.check_batches(batches)


@pytest.mark.parametrize("batches", [[], [{"x": 1}], ({"x": 1},), iter([{"x": 1}]), [UserDict(x=1)]])
def test_batches_pass(batches):
    validation.check_batches(batches)
