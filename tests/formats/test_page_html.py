"""The page model in the browser: everything is there, nothing is loaded, text from outside stays text."""

from __future__ import annotations

import math

import pytest
from html_checks import HOSTILE, Page, every_item, loads_nothing
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table
from tersor.formats.page_html import render
from tersor.formats.svg import SERIES

TILES = [("Parameters", "134.5 M", "30 layers"), ("Size", "269 MB", "")]
PROVENANCE = [("command", "tersor profile smol --hardware h100"), ("seed", "0")]


def page(*items, lead: str = "") -> Page:
    return Page(render("Smol on one H100", "tersor profile", [], [Section("Part", list(items), lead)], []))


def test_everything_is_on_the_page_in_order():
    found = Page(render("Smol on one H100", "tersor profile", TILES, every_item(), PROVENANCE))
    assert found.faults == []
    words = (
        "Smol on one H100 · tersor", "tersor profile", "Smol on one H100", "Parameters", "134.5 M", "30 layers", "Everything",
        "It has all kinds.", "hardware", "H100 SXM", "An aside.", "1 warning", "int4 is slower here.", "Operators", "per token",
        "mlp.up", "1.2 GB", "Tensors (300 rows)", "tensor 299", "Where the bytes are", "weights", "scales", "Roofline", "q_proj",
        "Timeline", "How to do it again", "tersor profile smol --hardware h100", "seed",
    )  # fmt: skip
    at = 0
    for text in words:
        assert text in found.text[at:], text
        at = found.text.index(text, at)


def test_nothing_is_loaded_and_no_script_may_run():
    html = render("T", "e", TILES, every_item(), PROVENANCE)
    loads_nothing(html)
    assert "script" not in html


def test_the_same_content_gives_the_same_page():
    assert render("T", "e", TILES, every_item(), PROVENANCE) == render("T", "e", TILES, every_item(), PROVENANCE)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(text):
    def sections(word: str) -> list[Section]:
        series = {word: [(1.0, 1.0), (2.0, 3.0)]}
        items = [
            Facts([(word, word)]), Notes([word, word]), Notes([word]), Notes([word], warn=True),
            Table(word, [word, word], [[word, word]], 1, word), Table(word, [word], [[word]], 1, word, folded=True),
            Bars(word, word, [(word, word, [(word, 1.0), (f"{word} 2", 1.0)])]),
            Plot(word, word, word, word, series, {word: [(1.0, 2.0, word)]}, log_x=True),
            Plot(word, word, word, word, series, steps=True),
        ]  # fmt: skip
        return [Section(word, items, word)]

    tiles, provenance = [(text, text, text)], [("command", text), (text, text)]
    found = Page(render(text, text, tiles, sections(text), provenance))
    plain = Page(render("word", "word", [("word",) * 3], sections("word"), [("command", "word"), ("word", "word")]))
    assert found.faults == []
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in found.tags] == [sorted(attributes) for _, attributes in plain.tags]
    assert found.raw == plain.raw
    assert found.words.count(text) > 20


def test_ids_are_unique_and_pictures_and_tables_are_named():
    found = Page(render("T", "e", TILES, every_item() * 2, PROVENANCE))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 2 * 2 * 3
    pictures = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 2 * 3
    assert all(set(picture["aria-labelledby"].split()) <= set(ids) for picture in pictures)
    assert all("scope" in attributes for tag, attributes in found.tags if tag == "th")
    regions = [attributes for _, attributes in found.tags if attributes.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)


def test_numbers_are_set_right():
    found = page(Table("T", ["name", "kind", "bytes"], [["a", "b", "1"]], 2))
    cells = [attributes.get("class") for tag, attributes in found.tags if tag in ("th", "td")]
    assert cells == [None, None, "n"] * 2


def test_short_rows_are_filled_up():
    found = page(Table("T", ["name", "bytes", "bits"], [["a"], ["a", "1", "2"], []]))
    assert sum(tag == "td" for tag, _ in found.tags) == 9


def test_long_tables_are_folded():
    rows = [[f"row {index}"] for index in range(1234)]
    assert "All of it (1,234 rows)" in page(Table("All of it", ["name"], rows, folded=True)).text
    assert "details" not in {tag for tag, _ in page(Table("All of it", ["name"], rows)).tags}


def test_bars_have_a_colour_per_series():
    found = page(Bars("B", "note", [("a", "3", [("x", 2.0), ("y", 1.0)]), ("b", "1", [("y", 1.0)])]))
    rects = [attributes for tag, attributes in found.tags if tag == "rect"]
    assert [rect["class"] for rect in rects] == ["s0", "s1", "s1"]
    assert [rect["width"] for rect in rects] == ["66.67%", "33.33%", "33.33%"]
    assert [rect["x"] for rect in rects] == ["0.00%", "66.67%", "0.00%"]
    keys = [
        attributes["class"] for tag, attributes in found.tags if tag == "span" and "key" in attributes.get("class", "")
    ]
    assert keys == ["key s0", "key s1"]
    alone = page(Bars("B", "note", [("a", "3", [("x", 2.0)])]))
    assert "span" not in {tag for tag, _ in alone.tags}


def test_bars_of_odd_numbers():
    odd = [("nan", "not a number", [("x", math.nan), ("y", 1.0)]), ("less", "-1", [("x", -1.0)]), ("none", "", [])]
    found = page(Bars("B", "", odd))
    assert found.faults == []
    assert [attributes["width"] for tag, attributes in found.tags if tag == "rect"] == ["0.00%", "100.00%", "0.00%"]
    assert page(Bars("B", "", [])).faults == []
    many = [("all", "", [(f"series {index}", 1.0) for index in range(SERIES + 2)])]
    rects = [attributes["class"] for tag, attributes in page(Bars("B", "", many)).tags if tag == "rect"]
    assert rects[-2:] == ["rest", "rest"]


def test_long_labels_leave_room_for_values():
    found = page(Bars("B", "", [("model.layers.0." + "deep." * 20 + "down_proj", "1.2 GB", [("x", 1.0)])]))
    label = next(text for text in found.words if "down_proj" in text)
    assert label.startswith("…") and len(label) <= 46
    found = page(
        Bars("B", "", [("attention", "53.1 MB · 19.7 % · 26.54 M parameters", [("x", 1.0)]), ("b", "9 GB " * 20, [])])
    )
    assert "53.1 MB · 19.7 % · 26.54 M parameters" in found.words
    assert max(map(len, found.words[found.words.index("b") :])) <= 52


def test_sections_without_content_are_left_out():
    html = render("T", "e", [], [Section("Nothing", []), Section("A sentence", [], "Alone.")], [])
    found = Page(html)
    assert "Nothing" not in found.text
    assert "Alone." in found.text
    assert "How to do it again" not in found.text


def test_what_is_no_item_is_refused():
    with pytest.raises(TypeError, match="str"):
        render("T", "e", [], [Section("S", ["text"])], [])
