"""The page model as plain text: aligned, within the width, without anything that controls a terminal."""

from __future__ import annotations

import re

import pytest
from html_checks import HOSTILE, every_item
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table
from tersor.formats.page_text import plain, render


def text(*items, width: int = 80, lead: str = "", **changes) -> str:
    return render([Section("Part", list(items), lead)], width, **changes)


def test_a_section_reads_like_this():
    rows = [["q_proj", "1.2 G", "3.4 MB"], ["down_proj", "10 G", "27 MB"]]
    found = text(
        Facts([("hardware", "H100"), ("batch", "1")]),
        Table("Operators", ["operator", "FLOP", "bytes"], rows, 1, "Per token."),
        Notes(["int4 is slower here."], warn=True),
        Notes(["One.", "Two."]),
        lead="Bound by memory.",
    )
    assert (
        found
        == """\
Part
====

Bound by memory.

hardware  H100
batch     1

Operators
Per token.
operator    FLOP   bytes
---------- ------ ------
q_proj     1.2 G  3.4 MB
down_proj   10 G   27 MB

Warning: int4 is slower here.

- One.
- Two.
"""
    )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_keep_to_the_width(width):
    found = render(every_item(), width)
    assert max(map(cell_len, found.splitlines())) <= width
    assert not [line for line in found.splitlines() if line != line.rstrip()]


def test_folded_tables_show_their_first_rows():
    rows = [[f"tensor {index}", "1 kB"] for index in range(300)]
    found = text(Table("All", ["tensor", "bytes"], rows, folded=True))
    assert "tensor 7" in found and "tensor 8" not in found
    assert "… 292 more in report.html" in found
    assert "more in" not in text(Table("All", ["tensor", "bytes"], rows[:8], folded=True))
    assert "tensor 299" in text(Table("All", ["tensor", "bytes"], rows))


def test_plots_are_for_the_browser():
    curve = Plot("Roofline", "", "x", "y", {"a": [(0, 1), (1, 2)]})
    assert text(curve) == ""
    assert text(curve, lead="Bound by memory.") == "Part\n====\n\nBound by memory.\n"


def test_bars_are_as_long_as_their_numbers():
    rows = [("mlp", "3 GB", [("weights", 2.0), ("scales", 1.0)]), ("norm", "1 kB", [("weights", 1e-6)]), ("none", "0 B", [("weights", 0.0)])]  # fmt: skip
    found = text(Bars("Bytes", "As stored.", rows)).splitlines()
    mlp, norm, none = (next(line for line in found if line.startswith(name)) for name in ("mlp", "norm", "none"))
    assert mlp.count("█") == 2 * mlp.count("▒") + 1 == 27
    assert norm.count("█") == 1
    assert "█" not in none
    assert mlp.endswith("3 GB") and norm.endswith("1 kB")
    assert "█ weights   ▒ scales" in found


def test_columns_break_before_numbers_do():
    heads = ["operator", "arithmetic intensity", "predicted time per token", "share of the whole"]
    rows = [[f"model.layers.self_attn.{name}_proj", "0.98 FLOP/B", "1.23 ms", "12.3 %"] for name in "qkvo"]
    found = text(Table("", heads, rows), width=72)
    for value in ("0.98 FLOP/B", "1.23 ms", "12.3 %", "model.layers.self_attn.q_proj"):
        assert value in found


def test_a_table_wider_than_the_screen_goes_on_below():
    rows = [["q_proj", *(f"{at}-cell" for at in range(10))], ["k_proj", *(f"{at}-field" for at in range(10))]]
    found = text(Table("", ["operator", *(f"column{at}" for at in range(10))], rows), width=40).splitlines()
    blocks = sum("operator" in line for line in found)
    assert blocks > 1
    assert sum("q_proj" in line for line in found) == sum("k_proj" in line for line in found) == blocks
    for at in range(10):
        assert sum(f"column{at}" in line for line in found) == 1
        assert sum(f"{at}-cell" in line for line in found) == 1
        assert sum(f"{at}-field" in line for line in found) == 1


def test_a_cell_wider_than_the_screen_loses_nothing():
    found = text(Table("", ["name", "bytes"], [["x" * 100, "8" * 50]]), width=40)
    assert (found.count("x"), found.count("8")) == (100, 50)


def test_rows_break_after_heads_do():
    heads = ["operator", "share of the time of a whole step"]
    found = text(Table("", heads, [["scores and values of attention", "12 %"]]), width=50)
    assert "scores and values of attention" in found
    assert heads[1] not in found


@pytest.mark.parametrize(
    "word", [*HOSTILE, "[red]not markup[/red]", ":smile:", "\x1b[31mred\x1b[0m", "a\u202eb\r\nc\x07"]
)
def test_nothing_in_it_controls_a_terminal(word):
    items = [
        Facts([(word, word)]), Notes([word, word], warn=True), Table(word, [word, word], [[word, word]], 1, word),
        Bars(word, word, [(word, word, [(word, 1.0)])]),
    ]  # fmt: skip
    found = render([Section(word, items, word)], 400)
    assert all(character.isprintable() or character == "\n" for character in found)
    safe = re.sub(r"\s+", " ", "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in word))
    assert found.count(safe) >= 10


def test_ascii_where_nothing_else_can_be_shown():
    assert plain("3.2×10⁻⁷ → 2 µs · länger … ≤ 中") == "3.2x10^-7 -> 2 us - langer ... <= ?"
    found = render(every_item(), 80, ascii_only=True)
    assert found.isascii()
    assert "x10^-7" in found


def test_nothing_is_nothing():
    assert render([], 80) == ""
    assert render([Section("Empty", [])], 80) == ""
    assert text(Facts([]), Notes([]), Bars("", "", [])) == ""
    assert render(every_item(), 80) == render(every_item(), 80)
    with pytest.raises(TypeError, match="str"):
        text("words")


WORDS = st.text(max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.lists(WORDS, min_size=1, max_size=5), max_size=4), heads=st.lists(WORDS, min_size=1, max_size=5),
    width=st.integers(0, 130), numeric=st.integers(0, 5),
)  # fmt: skip
def test_any_table_fits(cells, heads, width, numeric):
    found = text(Table("T", heads, cells, numeric), Facts([(row[0], row[-1]) for row in cells]), width=width)
    assert max(map(cell_len, found.splitlines())) <= max(width, 40)
    assert all(character.isprintable() or character == "\n" for character in found)
