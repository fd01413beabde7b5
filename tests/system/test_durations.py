"""durations.py: a duration is written in its two largest units."""

import pytest

from fuselm.system.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "0.0 s"),
        (3.46, "3.5 s"),
        (60.0, "1 min 00 s"),
        (419.6, "7 min 00 s"),
        (7500.0, "2 h 05 min"),
        (36_000.0, "10 h 00 min"),
    ],
)
def test_a_duration_is_written_in_its_two_largest_units(seconds, written):
    assert format_duration(seconds) == written


def test_a_duration_below_a_minute_has_as_many_decimals_as_asked():
    assert format_duration(14.4, decimals=0) == "14 s"
