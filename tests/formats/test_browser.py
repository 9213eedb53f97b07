"""Pages in a real browser: they render, no script fails, and their policy lets all of them through."""

from __future__ import annotations

import pytest
from html_checks import HOSTILE, every_item, shown
from tersor.formats.page import Plot, Section, Table
from tersor.formats.page_html import render
from tersor.formats.report import Report, TensorEntry
from tersor.formats.report_html import render as render_report


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_item_of_a_page(dark, tmp_path):
    hostile = [
        Section(text, [Table(text, [text], [[text]], 1, text, True), Plot(text, text, text, text, {text: [(0, 1), (1, 2)]})], text)
        for text in HOSTILE
    ]  # fmt: skip
    html = render("A page", "tersor profile", [("a", "b", "c")], [*every_item(), *hostile], [("command", "tersor x")])
    page = shown(html, tmp_path, dark)
    assert page.faults == []
    assert sum(attributes.get("role") == "img" for _, attributes in page.tags) == 3 + len(HOSTILE)
    assert sum(tag == "script" for tag, _ in page.tags) == 0
    assert sum(tag == "tr" for tag, _ in page.tags) == 300 + 1 + 2 + 1 + 2 * len(HOSTILE)
    for text in HOSTILE:
        assert text in page.words


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_a_report(dark, tmp_path):
    def entry(name: str, action: str) -> TensorEntry:
        before = {"dtype": "BF16", "shape": [64, 64], "bytes": 8192}
        after = {"dtype": "INT4 g32 symmetric", "shape": [64, 64], "bytes": 2304}
        error = {"relative_mse": 0.01, "sqnr_db": 20.0}
        return TensorEntry(name, action, "linear layer", before=before, after=after, error=error, sparsity=0.0, bits=4.5, seconds=0.1)  # fmt: skip

    side = {"path": "smol", "fingerprint": "abcd", "bytes": 16384, "params": 8192}
    report = Report(
        command="quantize", args={"scheme": "w4a16"}, seed=0, device="cpu", input=side, output=side | {"path": "small"}, seconds=83.0,
        peak_rss_bytes=1_500_000_000, warnings=HOSTILE, quality={"perplexity": 18.7},
        tensors=[entry(f"model.layers.{layer}.mlp.up.weight", "quantize") for layer in range(4)] + [entry(text, "keep") for text in HOSTILE],
    )  # fmt: skip
    page = shown(render_report(report.to_dict()), tmp_path, dark)
    assert sum(tag == "button" for tag, _ in page.tags) == 7  # the script ran: every column sorts
    assert "hidden" not in next(attributes for tag, attributes in page.tags if tag == "input")
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_a_broken_page_would_be_noticed(tmp_path):
    """The check can fail: a script that the policy does not name is reported."""
    html = render("A page", "tersor profile", [], every_item(), []).replace("</main>", "<script>1</script></main>")
    with pytest.raises(AssertionError, match="Content Security Policy"):
        shown(html, tmp_path)
