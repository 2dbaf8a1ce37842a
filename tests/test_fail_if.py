"""The small grammar of conditions."""

from __future__ import annotations

import pytest

from edgedistill.errors import UsageError
from edgedistill.fail_if import figures_like, read_condition


@pytest.mark.parametrize(
    ("text", "figure", "sign", "factor", "offset"),
    [
        ("tg128 < 0.95 * baseline", "tg128", "<", 0.95, 0.0),
        ("tg128<baseline*.95", "tg128", "<", 0.95, 0.0),
        ("agreement < baseline - 0.03", "agreement", "<", 1.0, -0.03),
        ("inter_token.p95 > 0.05", "inter_token_p95", ">", None, 0.05),
        ("  bytes >= 1.1 * baseline + 1e6 ", "bytes", ">=", 1.1, 1e6),
        ("tg128 <= -1", "tg128", "<=", None, -1.0),
        ("agreement < 1", "agreement", "<", None, 1.0),
        ("drift > 0", "drift", ">", None, 0.0),
        ("agreement < 97 %", "agreement", "<", None, 0.97),
        ("inter_token.p95 > 50 ms", "inter_token_p95", ">", None, 0.05),
        ("load > 2s", "load", ">", None, 2.0),
        ("gold < baseline - 2%", "gold", "<", 1.0, -0.02),
        ("peak_memory > 1.1 * baseline + 5 MB", "peak_memory", ">", 1.1, 5e6),
    ],
)
def test_conditions(text: str, figure: str, sign: str, factor: float | None, offset: float) -> None:
    found = read_condition(text)
    assert (found.figure, found.sign) == (figure, sign)
    assert (found.factor, found.offset) == (factor, pytest.approx(offset))


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        ("", 1, "a figure is expected here, not the end"),
        ("tg129 < 3", 1, "'tg129' is no figure"),
        ("0.5 < tg128", 1, "a figure is expected here, not '0.5'"),
        ("tg128 = 3", 7, "'=' is not understood"),
        ("tg128 == baseline", 7, "'=' is not understood"),
        ("tg128 baseline", 7, "<, <=, > or >= is expected here, not 'baseline'"),
        ("tg128 <", 8, "a number or `baseline` is expected here, not the end"),
        ("tg128 < 0.95 * base", 16, "a number or `baseline` is expected here, not 'base'"),
        ("tg128 < -baseline", 10, "a number is expected here, not 'baseline'"),
        ("tg128 < 0.95 baseline", 14, "a `*` is missing before `baseline`"),
        ("tg128 < baseline - ", 19, "a number is expected here, not the end"),
        ("tg128 < baseline - gold", 20, "a number is expected here, not 'gold'"),
        ("tg128 < baseline - 1 - 1", 22, "the end, a unit that fits"),
        ("tg128 < 0.9 * baseline * 2", 24, "the end, a unit that fits"),
        ("tg128 < 1e999", 9, "1e999 is too large"),
        ("tg128 < __import__('os')", 19, "'(' is not understood"),
        ("tg128 < 5; gold < 1", 10, "';' is not understood"),
        ("tg128 < 5 s", 11, "this figure is in tokens/s, which is not told in s"),
        ("load > 5 MB", 10, "this figure is in s, which is not told in MB"),
        ("load > 5 s s", 12, "the end, a unit that fits"),
        ("gold < 97 % * baseline", 13, "the end, a unit that fits"),
        ("tg128 > -0.97 * baseline", 9, "`baseline` cannot be taken a negative number of times"),
        ("load > % 5", 8, "a number or `baseline` is expected here, not '%'"),
    ],
)
def test_what_is_no_condition(text: str, at: int, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_condition(text)
    assert f"at character {at}: {said}" in raised.value.what
    assert raised.value.what.splitlines()[-1] == "    " + " " * (at - 1) + "^"
    assert "tg128" in str(raised.value.hint)


EXAMPLES = "as in `agreement < baseline - 3 %` or `agreement < 0.9`"


@pytest.mark.parametrize(
    ("text", "at", "hint"),
    [
        ("agreement < baseline - 3", 24, "did you mean 3 % or 0.03?"),
        ("agreement < baseline - 1", 24, "did you mean 1 % or 0.01?"),
        ("drift > 1.1 * baseline + 2.5", 26, "did you mean 2.5 % or 0.025?"),
        ("agreement > 97", 13, "did you mean 97 % or 0.97?"),
        ("regressions > 2", 15, "did you mean 2 % or 0.02?"),
        ("refusals > 1", 12, "did you mean 1 % or 0.01?"),
        ("gold < -3", 9, "did you mean baseline - 3 % or baseline - 0.03?"),
        ("gold < -3 %", 9, EXAMPLES),
        ("gold < 0", 8, EXAMPLES),
        ("agreement > 300 %", 13, EXAMPLES),
        ("agreement < baseline - 150", 24, EXAMPLES),
    ],
)
def test_a_bound_that_no_share_is_beyond(text: str, at: int, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_condition(text)
    assert f"at character {at}: a share is between 0 and 1" in raised.value.what
    assert raised.value.hint == hint


def test_bounds_beyond_every_baseline() -> None:
    """Of `2 * baseline - 1` some are shares (twice the errors), of `0.5 * baseline - 0.6` none."""
    assert read_condition("agreement < 2 * baseline - 1").bound(0.95) == pytest.approx(0.9)
    for text in ("agreement < 0.5 * baseline - 0.6", "agreement > baseline + 1"):
        with pytest.raises(UsageError, match="on one side of this bound"):
            read_condition(text)


def test_what_is_suggested_is_taken() -> None:
    for amount in ("3 %", "3%", "0.03"):
        found = read_condition(f"agreement < baseline - {amount}")
        assert found.offset == pytest.approx(-0.03)


def test_a_mistyped_figure() -> None:
    assert figures_like("tg129") == "did you mean tg128?"
    listed = figures_like("xyz")
    assert "inter_token_p95" in listed
    assert "end_to_end_p99" not in listed
    assert max(map(len, listed.splitlines())) <= 90
