"""`report.html`: says what is in the report, loads nothing, runs nothing that a tensor name brings along."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import svg
from tersor.formats.report import KEYS, Report, TensorEntry
from tersor.formats.report_html import command_line, render

VOID = {"meta", "link", "input", "br", "hr", "img", "col", "base", "source", "embed"}
SECTIONS = (
    "How this checkpoint came about", "Quality", "Where the bytes are", "Kept as it was", "What changed", "Layer by layer",
    "Every tensor", "How to do it again",
)  # fmt: skip
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


def entry(name, action="quantize", dtype="INT4 g32 symmetric", shape=(64, 64), after=2304, **changes) -> TensorEntry:
    nbytes = 2
    for extent in shape:
        nbytes *= extent
    values = {"reason": "linear layer in a block", "error": {"relative_mse": 0.01, "sqnr_db": 20.0}, "sparsity": 0.0,
              "bits": 4.5, "seconds": 0.1} | changes  # fmt: skip
    before = {"dtype": "BF16", "shape": list(shape), "bytes": nbytes}
    return TensorEntry(
        name, action, before=before, after={"dtype": dtype, "shape": list(shape), "bytes": after}, **values
    )


def kept(name: str, reason: str = "embedding, norm or convolution", nbytes: int = 8192) -> TensorEntry:
    return entry(name, "keep", "BF16", (64, nbytes // 128), nbytes, reason=reason, error=None, sparsity=None, bits=None)


def tensors(layers: int = 4) -> list[TensorEntry]:
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in ("mlp.up", "attn.q")]
    return [kept("model.embed_tokens.weight"), *map(entry, names)]


def content(**changes) -> dict:
    values = {
        "command": "quantize", "args": {"scheme": "w4a16", "method": "gptq", "exclude": ["lm_head$", "^x y"], "clip": False, "policy": None},
        "seed": 5, "device": "cpu", "input": {"path": "models/smol", "fingerprint": "abcd", "bytes": 73728, "params": 1},
        "output": {"path": "small", "fingerprint": "beef", "bytes": 26624, "params": 1}, "seconds": 83.0,
        "peak_rss_bytes": 1_500_000_000, "tensors": tensors(),
    }  # fmt: skip
    return Report(**values | changes).to_dict()


QUALITY = {
    "text": "book.txt", "windows": 24, "window_tokens": 512, "stride_tokens": 512, "tokens": 12264, "perplexity": 18.72,
    "compared_perplexity": 17.9, "kl_divergence": 0.0432, "top1_agreement": 0.891, "compared_with": "models/smol",
    "speed": {"decode_seconds": 0.0213, "read_gbps": 212.5, "slower": True},
}  # fmt: skip


def test_the_headline_says_what_was_done():
    page = Page(render(content(quality=QUALITY)))
    assert "Quantized smol to w4a16 with gptq: 73.7 kB became 26.6 kB, 2.77× smaller" in page.text
    for words in ("1 min 23 s", "1.5 GB", "18.72", "17.9 for smol (+4.6 %)", "0.0432", "89.1 %", "book.txt", "12,264",
                  "speed · decode 0.021 s", "speed · read 212 GB/s", "4.5 in what was changed"):  # fmt: skip
        assert words in page.text


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ("convert", {"to": "dense"}, "Converted smol to dense: 10 B became 20 B, 2× larger"),
        ("prune", {"method": "wanda", "sparsity": 0.5}, "Pruned smol with wanda at 50 % sparsity:"),
        ("sparsify", {}, "Sparsified smol:"), ("profile", {}, "Profiled smol:"), ("distill", {}, "Distilled smol:"),
        ("verify", {}, "Verified smol:"), ("evaluate", {}, "Evaluated smol:"),
    ],
)  # fmt: skip
def test_the_headline_of_other_commands(command, args, words):
    sizes = {"input": {"path": "smol", "fingerprint": "", "bytes": 10, "params": 1}}
    sizes["output"] = sizes["input"] | {"bytes": 20}
    assert words in Page(render(content(command=command, args=args, **sizes))).text


def test_what_was_not_compressed_is_in_sight_with_its_reason():
    html = render(content(tensors=[*tensors(), kept("lm_head.weight", "excluded by lm_head$", 65536)]))
    before_fold = Page(html[: html.index("<details>")]).text
    assert "2 of 10 tensors, 73.7 kB: 80" in before_fold
    assert "lm_head excluded by lm_head$ BF16 64×512 65.5 kB" in before_fold
    assert "embed_tokens embedding, norm or convolution" in before_fold


def test_history_is_told_oldest_first():
    first = content(
        command="prune", args={"method": "wanda"}, warnings=["slow"], input=content()["input"] | {"bytes": 147456}
    )
    report = content(history=[{key: first[key] for key in KEYS if key not in ("tensors", "history", "schema")}])
    page = Page(render(report))
    assert page.text.index("prune smol → small 147 kB → 26.6 kB") < page.text.index("slow")
    assert page.text.index("slow") < page.text.index("quantize smol → small 73.7 kB → 26.6 kB")
    assert "Whole pipeline 2 steps 147 kB → 26.6 kB, 5.54× smaller" in page.text


def test_sections_are_there_when_their_data_is():
    page = Page(render(content(quality=QUALITY, warnings=["w"], history=[{"command": "prune"}])))
    assert all(section in page.text for section in SECTIONS)
    assert "1 warning" in page.text
    bare = Page(render(content(tensors=[], output=None, args={})))
    assert [section for section in SECTIONS if section in bare.text] == ["How to do it again"]
    assert "warning" not in bare.text
    assert "svg" not in {tag for tag, _ in bare.tags}


def test_charts_follow_the_data():
    assert "Bits per weight Scales" not in Page(render(content())).text
    assert "Zeros Share" not in Page(render(content())).text
    mixed = [entry("a.0.x.weight", bits=8.0, sparsity=0.5), entry("a.1.x.weight", error={"mae": 3.0, "sqnr_db": 1.0})]
    text = Page(render(content(tensors=mixed))).text
    assert "Bits per weight Scales" in text
    assert "Zeros Share" in text
    assert "Layer by layer" not in Page(render(content(tensors=mixed[:1]))).text  # one layer is not a line
    other = [entry(f"a.{layer}.x", error={"mae": 3.0, "sqnr_db": 1.0}) for layer in range(2)]
    assert "Mae As the command measured it." in Page(render(content(tensors=other))).text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(text):
    reason = [entry(f"model.layers.{layer}.{text}", reason=text, dtype=text) for layer in range(2)]
    report = content(
        tensors=[kept(text, text), *reason], warnings=[text], quality={text: {text: text}, "text": text},
        command=text, device=text, args={text: text, "method": text, "scheme": [text]},
        input={"path": f"a/{text}", "fingerprint": text, "bytes": 1, "params": 1},
        history=[{"command": text, "args": {text: text}, "warnings": [text], "input": {"path": text}}, text],
    )  # fmt: skip
    page, plain = Page(render(report)), Page(render(content(history=[{}, ""], warnings=[""], quality={"text": "x"})))
    assert page.faults == []
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert {name for _, attributes in page.tags for name in attributes} <= {
        name for _, attributes in plain.tags for name in attributes
    }
    assert page.raw == plain.raw
    assert text in "".join(page.words)


def test_characters_that_hide_or_break_are_spelled_out():
    name = "a\u202eb\x00c\ud800d\ne\u200bf"
    html = render(content(tensors=[kept(name)]))
    html.encode("utf-8")
    assert r"a\u202eb\u0000c\ud800d\u000ae\u200bf" in html
    assert not set("\u202e\x00\ud800\u200b") & set(html)
    assert svg.escape("größer × ok") == "größer × ok"


def test_nothing_is_loaded_and_the_policy_names_what_may_run():
    html = render(content(quality=QUALITY))
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|import\(", html)
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for text in page.raw.values():
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_tags_match_and_pictures_and_tables_are_named():
    page = Page(render(content(quality=QUALITY, warnings=["w"], history=[{}])))
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) == 2
    assert all(set(picture["aria-labelledby"].split()) <= set(ids) for picture in pictures)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_ten_thousand_tensors_stay_small():
    many = [entry(f"model.layers.{layer}.mlp.experts.{expert}.gate_up_proj.weight", error={"relative_mse": 1e-3 * (1 + expert)})
            for layer in range(100) for expert in range(100)]  # fmt: skip
    strange = [kept(f"{index}-tensor-of-a-kind-of-its-own") for index in range(1000)]
    html = render(content(tensors=many + strange))
    page = Page(html)
    assert page.faults == []
    assert sum(tag == "tr" for tag, _ in page.tags) > 11_000
    assert len(html) < 3_000_000
    assert len(re.sub(r"<details>.*</details>", "", html, flags=re.DOTALL)) < 100_000
    assert "mlp.experts.gate_up_proj ×10,000" in page.text
    assert "Means where a layer has several of a kind." in page.text


def test_rows_past_the_most_are_counted(monkeypatch):
    monkeypatch.setattr("tersor.formats.report_html.MOST_ROWS", 3)
    page = Page(render(content()))
    assert "9 tensors The first 3; all are in report.json." in page.text
    assert sum("data-v" in attributes for _, attributes in page.tags) == 3 * 2 + 2  # sizes of all, errors of two


def test_the_same_report_gives_the_same_page():
    report = content(quality=QUALITY, history=[{"command": "prune"}])
    assert render(report) == render(json.loads(json.dumps(report)))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([*KEYS, "path", "bytes", "perplexity", "compared_perplexity", "bits_per_weight"]) | st.text(max_size=3), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(history=st.lists(ANYTHING, max_size=3), quality=st.dictionaries(st.sampled_from(sorted(QUALITY)) | st.text(max_size=3), ANYTHING, max_size=5))  # fmt: skip
def test_any_history_and_quality_can_be_shown(history, quality):
    report = content(tensors=[]) | {"history": history, "quality": quality}
    page = Page(render(report))
    assert page.faults == []


def test_the_command_line_can_be_run_again():
    line = command_line(content())
    assert (
        line
        == "tersor quantize models/smol -o small --scheme w4a16 --method gptq --exclude 'lm_head$' --exclude '^x y' --no-clip"
    )
    assert (
        command_line({"command": "x", "args": {"group_size": -1, "strict": True, "off": False}})
        == "tersor x MODEL --group-size=-1 --strict"
    )


def test_switches_that_are_off_are_spelled_as_the_shell_knows_them():
    from tersor.cli.main import app
    from typer.main import get_command

    switches = [
        (name, option)
        for name, command in get_command(app).commands.items()
        for option in command.params
        if option.secondary_opts
    ]
    assert ("quantize", "symmetric") in [(name, option.name) for name, option in switches]
    for name, option in switches:
        assert command_line({"command": name, "args": {option.name: False}}).split()[-1] in option.secondary_opts


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (svg.size(0), "0 B"), (svg.size(999), "999 B"), (svg.size(999_900), "1 MB"), (svg.size(269_030_016), "269 MB"),
        (svg.size(1.5e15), "1,500.00 TB"), (svg.count(134_515_008), "134.5 M"), (svg.count(12), "12"),
        (svg.duration(0.0123), "0.012 s"), (svg.duration(59.96), "60 s"), (svg.duration(396), "6 min 36 s"),
        (svg.duration(7380), "2 h 3 min"), (svg.number(4.1252, 4), "4.125"), (svg.number(3.0), "3"), (svg.number(-0.5), "-0.5"),
        (svg.number(123456.7), "123,457"), (svg.number(1.25e-7), "1.2×10⁻⁷"), (svg.number("x"), "x"), (svg.number(10**400), "1" + "0" * 400),
        (svg.percent(0.0098), "0.98 %"), (svg.percent(1), "100 %"), (svg.ratio(4, 4), "same size"), (svg.ratio(3, 12), "4× larger"),
    ],
)  # fmt: skip
def test_numbers_in_human_units(shown, expected):
    assert shown == expected


def heights(html: str) -> list[int]:
    return [int(found) for found in re.findall(r'class="dot" d="M\d+ (-?\d+)h0"><title>', html)]


def test_lines_share_colours_and_scale():
    twelve = [(f"kind {index}", x, 1.0) for index in range(12) for x in range(3)]
    html = svg.lines("k", "T", "D", twelve, svg.number, "layer")
    assert html.count("<polyline") == svg.SERIES
    assert "5 other kinds" in html
    linear = heights(svg.lines("k", "T", "D", [("a", 0, 0.0), ("a", 1, 1.0), ("a", 2, 2.0)], svg.number, "x"))
    assert linear == [1000, 500, 0]
    logarithmic = heights(
        svg.lines("k", "T", "D", [("a", x, y) for x, y in enumerate((0.0, 1, 10, 100))], svg.number, "x")
    )
    assert logarithmic[0] == 1000  # no logarithm of zero
    assert logarithmic[1] - logarithmic[2] == pytest.approx(logarithmic[2] - logarithmic[3], abs=1)
    assert svg.lines("k", "T", "D", [("a", 1, 1.0), ("b", 1, 2.0)], svg.number, "x") == ""


def test_long_lines_are_thinned_to_means():
    html = svg.lines("k", "T", "D", [("a", x, float(x % 2)) for x in range(100_000)], svg.number, "x")
    points = re.search(r'points="([^"]*)"', html)[1].split()
    assert svg.COLUMNS / 2 <= len(points) <= svg.COLUMNS + 1
    assert 'class="dot" d="M0 ' in html
    assert all(int(point.split(",")[1]) in range(0, 1001) for point in points)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint(scheme, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here to render the page")
    hostile = [kept(text) for text in HOSTILE]
    path = tmp_path / "report.html"
    path.write_text(render(content(tensors=[*tensors(), *hostile], quality=QUALITY, warnings=HOSTILE)), "utf-8")
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    shown = Page(result.stdout)
    assert sum(tag == "button" for tag, _ in shown.tags) == 7  # the script ran: every column sorts
    assert "hidden" not in next(attributes for tag, attributes in shown.tags if tag == "input")
    assert sum(tag == "script" for tag, _ in shown.tags) == 1
