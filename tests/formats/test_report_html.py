"""`report.html`: says what is in the report, loads nothing, runs nothing that a tensor name brings along."""

from __future__ import annotations

import json
import re

import pytest
from html_checks import HOSTILE, Page, loads_nothing
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import svg
from tersor.formats.report import KEYS, Report, TensorEntry
from tersor.formats.report_html import command_line, render

SECTIONS = (
    "How this checkpoint came about", "Quality", "Where the bytes are", "Kept as it was", "What changed", "Layer by layer",
    "Every tensor", "How to do it again",
)  # fmt: skip


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
    loads_nothing(render(content(quality=QUALITY)))


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
    begun = {"command": "distill", "input": {"path": "whole"}, "args": {"config": "small.json", "teacher": "whole"}}
    assert command_line(begun) == "tersor distill --config small.json --teacher whole"


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
