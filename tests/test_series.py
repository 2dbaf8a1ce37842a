"""Names that fit into a legend, and looks that differ."""

from __future__ import annotations

import pytest

from edgedistill.report.series import columns_of, look, shortened


def test_the_first_twelve_lines_and_markers_differ() -> None:
    looks = [look(place) for place in range(12)]
    assert len({(colour, dashes) for colour, _, dashes in looks}) == 12
    assert len({(colour, marker) for colour, marker, _ in looks}) == 12


@pytest.mark.parametrize(
    ("names", "room", "expected"),
    [
        (["short", "a"], 5, ["short", "a"]),
        (["abcdefghij"], 5, ["ab\u2026ij"]),
        (["abc-1-xyz", "abc-2-xyz", "other"], 8, ["ab\u2026yz 1", "ab\u2026yz 2", "other"]),
    ],
)
def test_names_that_are_too_long_stay_apart(
    names: list[str], room: int, expected: list[str]
) -> None:
    assert shortened(names, room) == expected
    assert max(map(len, expected)) <= room


@pytest.mark.parametrize("narrow", [True, False])
def test_a_legend_has_room_for_its_names(narrow: bool) -> None:
    for count in (1, 3, 12):
        for length in (4, 20, 40, 80):
            columns, room = columns_of(["x" * length] * count, narrow)
            assert columns * (6 * room + 30) < (340 if narrow else 660)
