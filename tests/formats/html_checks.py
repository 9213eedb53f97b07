"""What tests of pages share: a parser that notices faults, texts that try to break out, and a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table

VOID = {"meta", "link", "input", "br", "hr", "img", "col", "base", "source", "embed"}
HOSTILE = [
    "<script>alert(1)</script>", "</style></script><img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "' autofocus onfocus='x",
    "</title><base href=//evil>", "&lt;b&gt;&amp;", "</td></table></details>", "<!--", "]]>", "model.layers.1.</svg><script>x",
]  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, text outside script and style, and every way in which tags do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.words, self.faults, self.open, self.raw = [], [], [], [], {"script": "", "style": ""}
        self.feed(html)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def loads_nothing(html: str) -> None:
    """No tag or attribute that loads or runs anything, and a policy that names the texts of the page alone."""
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|import\(", html)
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    texts = [text for text in page.raw.values() if text]
    assert page.raw["style"] in texts
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    assert re.findall(r"'sha256-([^']+)'", policy) == sorted(hashes, key=policy.index)


def shown(html: str, folder: Path, dark: bool = False) -> Page:
    """The page as headless Chromium has it once it is loaded; fails on anything that it complains about."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium here to render the page")
    path = folder / "page.html"
    path.write_text(html, "utf-8")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={folder / 'browser'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line], result.stderr
    return Page(result.stdout)


def every_item() -> list[Section]:
    """A section with an item of every kind that a page may have."""
    ridge = [(0.1, 3.35e11), (295.0, 9.89e14), (4000.0, 9.89e14)]
    items = [
        Facts([("hardware", "H100 SXM"), ("error", "3.2×10⁻⁷")]),
        Notes(["An aside.", "And another that is long enough to be wrapped on any terminal of an ordinary width, twice."]),
        Notes(["int4 is slower here."], warn=True),
        Table("Operators", ["operator", "bytes"], [["mlp.up", "1.2 GB"], ["mlp.down", "34 MB"]], 1, "per token"),
        Table("Tensors", ["tensor", "bytes"], [[f"tensor {index}", "1 kB"] for index in range(300)], folded=True),
        Bars("Where the bytes are", "", [("mlp", "1.2 GB", [("weights", 1.2e9), ("scales", 1e8)]), ("norm", "1 kB", [("weights", 1e3)])]),
        Plot("Roofline", "What the chip can do.", "FLOP per byte", "FLOP/s", {"bf16": ridge}, {"decode": [(1.0, 2e12, "q_proj"), (1.0, 2e12, "k_proj"), (200.0, 3e14, "mlp")]}, True, True, unit_y="count"),
        Plot("Timeline", "", "time", "", {"live": [(at, float(at * 37 % 101)) for at in range(5000)]}, steps=True, unit_x="duration", unit_y="size"),
    ]  # fmt: skip
    return [Section("Everything", items, "It has all kinds.")]
