"""Calibration text to token windows, and what is learned from the inputs of a layer."""

from __future__ import annotations

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.model.calibration import cut_windows, load_windows, special_tokens
from tersor.ops.model.statistics import KINDS, PANEL_COLUMNS, InputStatistics
from tersor.ops.model.text import default_text, load_text
from tiny_models import byte_tokenizer

# ---- text


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("grüße\n", "utf-8")
    assert load_text(str(tmp_path / "a.txt")) == "grüße\n"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n{"id": 1, "content": "three"}\n')
    assert load_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo\n\nthree"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["x", None, "y"]}), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet")) == "x\n\ny"
    assert len(default_text()) > 100_000 and load_text(None) == default_text()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00bad", "not readable as text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.jsonl", b'{"text": "fine"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", b'{"title": "x"}', "line 1 has no text"),
        ("a.jsonl", b"3", "line 1 has no text"),
        ("a.parquet", b"PAR0", "not a parquet file"),
    ],
)
def test_text_that_is_none(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TersorError, match=words):
        load_text(str(tmp_path / name))


def test_text_that_is_missing(tmp_path):
    with pytest.raises(TersorError, match="no such file"):
        load_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(TersorError, match="no text to be had from the Hub"):
        load_text("nobody/nothing")  # the tests run offline
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(TersorError, match=r"columns are \['id'\]"):
        load_text(str(tmp_path / "a.parquet"))


# ---- windows


def framed_tokenizer():
    """Puts [CLS] before and [SEP] after, as BERT's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids[0]), ("[SEP]", ids[1])]
    )
    return tokenizer, ids


def test_windows_are_consecutive_text():
    text = "The quick brown fox jumps over the lazy dog. " * 4
    tokenizer = byte_tokenizer()
    windows = cut_windows(tokenizer, text, 16)
    assert all(len(window) == 16 for window in windows)
    assert len(windows) == len(text) // 16
    assert "".join(tokenizer.decode(window) for window in windows) == text[: len(windows) * 16]


def test_windows_are_framed_as_the_tokenizer_frames():
    tokenizer, (first, last) = framed_tokenizer()
    assert special_tokens(tokenizer) == ([first], [last])
    assert special_tokens(byte_tokenizer()) == ([], [])
    windows = cut_windows(tokenizer, "abcdefghij" * 3, 12)
    assert len(windows) == 3
    assert all(len(window) == 12 and (window[0], window[-1]) == (first, last) for window in windows)
    assert tokenizer.decode(windows[1][1:-1]) == "abcdefghij"
    with pytest.raises(TersorError, match="--seq-len 3"):
        cut_windows(tokenizer, "abcdef", 3)


def test_drawn_windows(family, text):
    """Without replacement, in text order, the same for the same seed."""
    model = family("llama")
    every = [tuple(window) for window in cut_windows(byte_tokenizer(), text.read_text("utf-8"), 32)]
    drawn = load_windows(model, str(text), 20, 32, seed=1)
    assert drawn.shape == (20, 32) and drawn.dtype == torch.int64
    places = [every.index(tuple(window)) for window in drawn.tolist()]
    assert places == sorted(set(places)) and len(places) == 20
    assert torch.equal(drawn, load_windows(model, str(text), 20, 32, seed=1))
    assert not torch.equal(drawn, load_windows(model, str(text), 20, 32, seed=2))
    assert load_windows(model, str(text), len(every), 32).tolist() == [list(window) for window in every]


def test_too_little_text(family, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    assert load_windows(family("llama"), str(path), 3, 32).shape == (3, 32)
    with pytest.raises(TersorError, match=r"short\.txt gives 3 windows of 32 tokens, 4 were asked for"):
        load_windows(family("llama"), str(path), 4, 32)
    with pytest.raises(TersorError, match="public-domain"):
        load_windows(family("llama"), None, 10**6, 64)


def test_no_tokenizer(family, tmp_path):
    model = shutil.copytree(family("llama"), tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TersorError, match="no tokenizer"):
        load_windows(model, None, 1, 32)


def test_text_from_the_model_itself(family):
    """Sampled, full length, repeatable, and the caller's random state is left alone."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    windows = load_windows(family("llama"), "self", 3, 24, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert windows.shape == (3, 24)
    assert windows.min() >= 0 and windows.max() < 256
    assert torch.equal(windows, load_windows(family("llama"), "self", 3, 24, seed=5))
    assert not torch.equal(windows, load_windows(family("llama"), "self", 3, 24, seed=6))
    assert len({tuple(window) for window in windows.tolist()}) == 3


# ---- statistics


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    columns=st.sampled_from([1, 5, 64, PANEL_COLUMNS, PANEL_COLUMNS + 1, 2 * PANEL_COLUMNS + 8]),
    parts=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_statistics_do_not_depend_on_batches(tokens, columns, parts, dtype, seed):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    statistics = InputStatistics(set(KINDS), max_samples=16)
    for part in x.chunk(parts):
        statistics.add(part[None])
    x = x.double()
    assert statistics.tokens == tokens
    assert torch.equal(statistics.samples, x[:16].float())
    for found, expected in [
        (statistics.hessian, x.T @ x / tokens),
        (statistics.column_norms, x.norm(dim=0)),
        (statistics.column_means, x.abs().mean(dim=0)),
    ]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(statistics.hessian, statistics.hessian.T)


def test_rescaled_statistics_are_those_of_rescaled_inputs():
    x, factor = torch.randn(50, 40), torch.rand(40) + 0.5
    found, expected = InputStatistics(set(KINDS)), InputStatistics(set(KINDS))
    found.add(x)
    found.prepared["something"] = 1
    found.rescale(factor)
    expected.add(x * factor)
    assert not found.prepared
    for kind in KINDS:
        name = {"hessian": "hessian", "samples": "samples"}.get(kind, kind)
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_norms_from_the_hessian():
    x = torch.randn(30, 20)
    statistics = InputStatistics({"hessian"})
    statistics.add(x)
    torch.testing.assert_close(statistics.column_norms, x.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_unknown_statistics():
    with pytest.raises(ValueError, match="kurtosis"):
        InputStatistics({"hessian", "kurtosis"})


def test_calibration_reaches_the_report(family, text, tmp_path):
    """What was asked for is in the report's arguments, so that a checkpoint tells how it was made."""
    from tersor.ops.quantize.run import Request, quantize

    out = tmp_path / "out"
    quantize(
        Request(str(family("llama")), out, method="gptq", group_size=32, calib=str(text), samples=3, seq_len=24, seed=4)
    )
    arguments = json.loads((out / "report.json").read_text())["args"]
    assert (arguments["samples"], arguments["seq_len"], arguments["seed"]) == (3, 24, 4)
    assert arguments["calib"] == str(text) and arguments["method"] == "gptq"
