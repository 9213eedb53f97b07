import pytest
from tersor.formats import units


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.size(0), "0 B"), (units.size(999), "999 B"), (units.size(999_900), "1 MB"), (units.size(269_030_016), "269 MB"),
        (units.size(1.5e15), "1,500.00 TB"), (units.count(134_515_008), "134.5 M"), (units.count(12), "12"),
        (units.duration(0.0123), "0.012 s"), (units.duration(59.96), "60 s"), (units.duration(396), "6 min 36 s"),
        (units.duration(7380), "2 h 3 min"), (units.number(4.1252, 4), "4.125"), (units.number(3.0), "3"), (units.number(410.2), "410"), (units.number(999.6), "1000"), (units.number(-0.5), "-0.5"),
        (units.number(123456.7), "123,457"), (units.number(1.25e-7), "1.2×10⁻⁷"), (units.number("x"), "x"), (units.number(5e-324), "4.9×10⁻³²⁴"),
        (units.latency(0.0123), "12.3 ms"), (units.latency(2e-5), "20 µs"), (units.latency(1.5), "1.5 s"), (units.number(10**400), "1" + "0" * 400),
        (units.percent(0.0098), "0.98 %"), (units.percent(1), "100 %"), (units.ratio(4, 4), "same size"), (units.ratio(3, 12), "4× larger"),
    ],
)  # fmt: skip
def test_numbers_in_human_units(shown, expected):
    assert shown == expected
