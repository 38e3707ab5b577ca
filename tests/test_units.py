"""Numbers as people read them."""

import pytest

from gptq_webui.core.units import format_bytes, format_duration, format_rate, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 KB"), (52_300_000, "52.3 MB"), (960_000_000, "960.0 MB"),
     (4_160_000_000, "4.16 GB"), (2 * 10**12, "2.00 TB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("count", [999_949, 999_950, 999_999, 999_949_999, 999_960_000, 999_999_999_999])
def test_bytes_just_below_a_unit_never_read_a_thousand_of_the_one_below(count: int) -> None:
    assert not format_bytes(count).startswith("1000")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (5.2, "5 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7500, "2 h 5 min"), (-3, "0 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rate_and_plural() -> None:
    assert format_rate(52_300_000.0) == "52.3 MB/s"
    assert (plural(1, "file"), plural(3, "file"), plural(0, "file")) == ("1 file", "3 files", "0 files")
