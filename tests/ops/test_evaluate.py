"""evaluate: its numbers are those of a plain transformers run over the same windows, and refusals are clear."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.cli.main import app
from tersor.formats.errors import TersorError
from tersor.formats.report_html import render
from tersor.ops.evaluate.run import IGNORED, Request, cut_targets, evaluate
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from typer.testing import CliRunner

SEQ_LEN = 48


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """2,000 bytes, which are 2,000 tokens."""
    from tersor.ops.model.text import default_text

    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text("".join(filter(str.isascii, default_text()[50_000:60_000]))[:2000], "utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(family, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(QuantizeRequest(str(family("llama")), out, group_size=32))
    return out


def plain_windows(text: Path, seq_len: int, stride: int) -> list[tuple[list[int], int]]:
    """Windows of bytes, and how many of the last tokens of each are new. Written anew here, not imported."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(text.parent)(text.read_text("utf-8")).input_ids
    return [
        (tokens[start : start + seq_len], seq_len - 1 if start == 0 else min(stride, seq_len - 1))
        for start in range(0, len(tokens) - seq_len + 1, stride)
    ]


@torch.no_grad()
def plain_logits(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """`[windows, seq_len, vocab]` of the whole model in float32, as transformers runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(windows).logits


def plain_perplexity(folder: Path, text: Path, seq_len: int, stride: int) -> tuple[float, int]:
    windows = plain_windows(text, seq_len, stride)
    ids = torch.tensor([window for window, _ in windows])
    log_p = plain_logits(folder, ids).double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    loss, count = 0.0, 0
    for row, (_, new) in enumerate(windows):
        loss -= float(log_p[row, -new:].sum())
        count += new
    return math.exp(loss / count), count


@pytest.fixture(scope="module", autouse=True)
def tokenizer_beside_text(short, family):
    """The windows of the reference are cut with the models' own tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(family("llama") / name, short.parent / name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("stride", [None, 20])
def test_perplexity_is_the_plain_one(name, stride, family, short):
    expected, count = plain_perplexity(family(name), short, SEQ_LEN, stride or SEQ_LEN)
    quality = evaluate(Request(str(family(name)), str(short), SEQ_LEN, stride)).quality
    assert quality["tokens"] == count
    assert quality["perplexity"] == pytest.approx(expected, rel=2e-6)
    assert quality["window_tokens"] == SEQ_LEN
    assert quality["stride_tokens"] == (stride or SEQ_LEN)


@pytest.mark.parametrize("stride", [1, 7, 20, 47, 48])
def test_each_token_is_scored_once(stride, family, short):
    """Every text token from the second on, up to the end of the last window, is the target of one position."""
    windows, targets, _ = cut_targets(family("llama"), Request("", str(short), SEQ_LEN, stride))
    text = short.read_bytes()
    scored = {}
    for row, (window, target) in enumerate(zip(windows, targets, strict=True)):
        assert len(window) == SEQ_LEN
        for position in torch.nonzero(target != IGNORED).flatten().tolist():
            assert target[position] == window[position + 1]
            place = row * stride + position + 1
            assert place not in scored
            scored[place] = int(target[position])
    last = (len(windows) - 1) * stride + SEQ_LEN
    skipped = {row * stride for row in range(len(windows))} if stride == SEQ_LEN else {0}  # no context at all
    assert set(scored) == set(range(last)) - skipped
    assert len(text) - last < stride
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(family("llama"))(text.decode()).input_ids
    assert all(tokens[place] == token for place, token in scored.items())


def test_special_tokens_frame_every_window_and_are_not_scored(family, tmp_path, short):
    """A tokenizer that puts BOS before and EOS after: the first text token counts, EOS does not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = shutil.copytree(family("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    symbols = {token: index for token, index in tokenizer.get_vocab().items() if index in (7, 9)}
    (first, first_id), (last, last_id) = symbols.items()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, first_id), (last, last_id)]
    )
    tokenizer.save_pretrained(folder)
    plain = tokenizer(short.read_text(), add_special_tokens=False).input_ids
    windows, targets, stride = cut_targets(folder, Request("", str(short), SEQ_LEN))
    body = SEQ_LEN - 2
    assert stride == body
    for row, (window, target) in enumerate(zip(windows, targets, strict=True)):
        assert window.tolist() == [first_id, *plain[row * body : (row + 1) * body], last_id]
        assert target.tolist() == [*plain[row * body : (row + 1) * body], IGNORED, IGNORED]


def test_max_windows(family, short):
    whole = evaluate(Request(str(family("llama")), str(short), SEQ_LEN)).quality
    three = evaluate(Request(str(family("llama")), str(short), SEQ_LEN, max_windows=3)).quality
    assert whole["windows"] == 2000 // SEQ_LEN
    assert three["windows"] == 3
    assert three["tokens"] == 3 * (SEQ_LEN - 1)


@pytest.mark.parametrize("seq_len", [SEQ_LEN, 600])
def test_compare_is_brute_force_on_full_logits(seq_len, family, quantized, short, tmp_path):
    """Windows past 256 positions go through the head in chunks; several windows make several batches."""
    from tersor.ops.convert.run import Request as ConvertRequest
    from tersor.ops.convert.run import convert

    changes = {"max_position_embeddings": 1024} if seq_len > 128 else {}
    original = family("llama", **changes)
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    quantize(QuantizeRequest(str(original), packed, group_size=32))
    convert(ConvertRequest(str(packed), dense, "dense", "float32"))
    windows = torch.tensor([window for window, _ in plain_windows(short, seq_len, seq_len)])
    p = plain_logits(dense, windows).double().log_softmax(-1)[:, :-1]
    q = plain_logits(original, windows).double().log_softmax(-1)[:, :-1]
    labels = windows[:, 1:, None]
    quality = evaluate(Request(str(packed), str(short), seq_len, compare=str(original))).quality
    assert quality["perplexity"] == pytest.approx(math.exp(-float(p.gather(-1, labels).mean())), rel=2e-6)
    assert quality["compared_perplexity"] == pytest.approx(math.exp(-float(q.gather(-1, labels).mean())), rel=2e-6)
    assert quality["kl_divergence"] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
    assert quality["kl_divergence"] > 1e-5
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert quality["top1_agreement"] == pytest.approx(agreement, abs=1.5 / labels.numel())
    assert 0.3 < quality["top1_agreement"] < 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_equals_itself(name, family, short):
    model = str(family(name))
    quality = evaluate(Request(model, str(short), SEQ_LEN, max_windows=4, compare=model)).quality
    assert quality["kl_divergence"] == 0
    assert quality["top1_agreement"] == 1
    assert quality["compared_perplexity"] == quality["perplexity"]
    assert quality["compared_with"] == model


def test_memory_cap_changes_nothing(family, short):
    model = str(family("llama"))
    free = evaluate(Request(model, str(short), SEQ_LEN)).quality
    capped = evaluate(Request(model, str(short), SEQ_LEN, max_memory_bytes=16 << 30)).quality
    assert capped == free


@pytest.mark.parametrize(
    ("name", "word"), [("bert", "BertModel"), ("bert-mlm", "BertForMaskedLM"), ("roberta", "Roberta")]
)
def test_no_causal_model(name, word, family, short):
    with pytest.raises(TersorError, match=word) as caught:
        evaluate(Request(str(family(name)), str(short), SEQ_LEN))
    assert "causal" in caught.value.hint


def without_head(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_head_without_weights(family, tmp_path, short):
    """A head of zeros would give every token the same probability, and a perplexity that looks like a result."""
    folder = without_head(shutil.copytree(family("llama"), tmp_path / "headless"))
    with pytest.raises(TersorError, match=r"lm_head\.weight"):
        evaluate(Request(str(folder), str(short), SEQ_LEN))


def test_tied_head_needs_no_tensor(family, short):
    expected, _ = plain_perplexity(family("llama-tied"), short, SEQ_LEN, SEQ_LEN)
    quality = evaluate(Request(str(family("llama-tied")), str(short), SEQ_LEN)).quality
    assert quality["perplexity"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 4000}, ["short.txt", "2000 tokens", "4000"]),
        ({"seq_len": 48, "stride": 49}, ["--stride 49", "48"]),
        ({"seq_len": 48, "text": "missing.txt"}, ["missing.txt"]),
    ],
)
def test_refused(settings, words, family, short):
    with pytest.raises(TersorError) as caught:
        evaluate(Request(str(family("llama")), **{"text": str(short)} | settings))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


def test_models_with_other_vocabularies(family, short):
    with pytest.raises(TersorError, match="64 embeddings"):
        evaluate(
            Request(str(family("llama")), str(short), SEQ_LEN, compare=str(family("llama", vocab_size=64))),
        )


def run(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def test_json_is_all_of_stdout(family, short):
    result = run("evaluate", family("llama"), "--text", short, "--seq-len", SEQ_LEN, "--max-windows", 2, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["schema"] == "tersor.report/1"
    assert report["command"] == "evaluate"
    assert report["quality"]["perplexity"] == pytest.approx(math.exp(math.log(report["quality"]["perplexity"])))
    assert report["quality"]["perplexity"] > 1


def test_stdout_is_the_model(quantized, short):
    result = run("evaluate", quantized, "--text", short, "--seq-len", SEQ_LEN, "--max-windows", 2)
    assert (result.exit_code, result.stdout) == (0, f"{quantized}\n"), result.stderr


def test_record(quantized, short, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    before = json.loads((folder / "report.json").read_text())
    (folder / "report.html").unlink()
    result = run(
        "evaluate", folder, "--text", short, "--seq-len", SEQ_LEN, "--max-windows", 2, "--record", "--json", "-q"
    )
    assert result.exit_code == 0, result.stderr
    after = json.loads((folder / "report.json").read_text())
    assert after["quality"] == json.loads(result.stdout)["quality"]
    assert {key: value for key, value in after.items() if key != "quality"} == {
        key: value for key, value in before.items() if key != "quality"
    }
    assert (folder / "report.html").read_text() == render(after)
    assert run("verify", folder, "-q").exit_code == 0


def test_record_needs_a_report(family, short):
    """Noticed before the work, not after it."""
    model = family("llama")
    result = run("evaluate", model, "--text", short, "--seq-len", SEQ_LEN, "--record")
    assert result.exit_code == 1
    assert "report.json" in result.stderr
    assert "blocks" not in result.stderr
    assert not (model / "report.json").exists()


def test_earlier_quality_is_kept(quantized, short, tmp_path):
    """A second measurement of another kind adds to the report."""
    folder = shutil.copytree(quantized, tmp_path / "model")
    common = ["--text", short, "--seq-len", SEQ_LEN, "--max-windows", 1, "--record", "-q"]
    assert run("evaluate", folder, *common, "--compare", quantized).exit_code == 0
    assert run("evaluate", folder, *common).exit_code == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]
    assert quality["kl_divergence"] == 0
    assert quality["perplexity"] > 1
