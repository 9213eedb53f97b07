"""Windows of a text in an order that depends on the seed and nothing else."""

from __future__ import annotations

import pytest
import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.data import TrainingData, _epoch
from tersor.ops.evaluate import run as evaluate
from tersor.ops.model.calibration import cut_windows, load_tokenizer
from tiny_models import byte_tokenizer
from tokenizers import processors


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """A tokenizer that puts one token before a text and one after it."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="! $A #", special_tokens=[("!", tokenizer.convert_tokens_to_ids("!")), ("#", 2)]
    )
    folder = tmp_path_factory.mktemp("framed")
    tokenizer.save_pretrained(folder)
    return folder


def test_windows_are_those_of_calibration(family, text):
    folder = family("llama")
    data = TrainingData(folder, str(text), seq_len=50, batch=4, steps=3)
    assert data.windows.tolist() == cut_windows(load_tokenizer(folder), text.read_text("utf-8"), 50)
    assert data.ids(0).shape == (4, 50) and data.ids(0).dtype == torch.int64
    assert torch.equal(data.ids(1), data.windows[data.indices(1)])


def test_every_epoch_is_a_permutation_and_none_is_like_another(family, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("abcdefghij" * 21)  # 21 windows of 10, which 8 does not divide
    data = TrainingData(family("llama"), str(source), seq_len=10, batch=8, steps=21)
    seen = [index for step in range(21) for index in data.indices(step)]
    epochs = [seen[start : start + 21] for start in range(0, len(seen), 21)]
    assert len(epochs) == 8 == data.epochs
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_order_is_a_matter_of_the_seed_alone(family, text):
    folder = family("llama")
    orders = []
    for seed, steps in ((0, 5), (0, 500), (1, 5)):
        data = TrainingData(folder, str(text), seq_len=50, batch=4, steps=steps, seed=seed)
        orders.append([data.indices(step) for step in range(5)])
    assert orders[0] == orders[1] != orders[2]
    # Written down, so that another version of Python or of this file that changes the order is noticed.
    assert [_epoch(7, seed=0, epoch=epoch) for epoch in (0, 1)] == [[0, 3, 4, 1, 5, 2, 6], [6, 3, 1, 2, 0, 4, 5]]


def test_processes_share_a_batch_without_overlap(family, text):
    data = TrainingData(family("llama"), str(text), seq_len=50, batch=7, steps=3)
    for ranks in (1, 2, 3, 7):
        parts = [data.part(rank, ranks) for rank in range(ranks)]
        assert [index for part in parts for index in part.indices(2)] == data.indices(2)
        assert torch.equal(torch.cat([part.ids(1) for part in parts]), data.ids(1))
        assert sum(part.rows for part in parts) == 7
        assert all(part.used() == data.used() and part.facts() == data.facts() for part in parts)
    with pytest.raises(TersorError, match="8 processes share a batch of 7") as error:
        data.part(0, 8)
    assert "--batch to 8" in error.value.hint


@pytest.mark.parametrize("steps", [1, 5, 148, 149, 150, 300])
def test_used_windows_are_those_of_all_steps(family, text, steps):
    data = TrainingData(family("llama"), str(text), seq_len=50, batch=4, steps=steps)
    assert data.used() == sorted({index for step in range(steps) for index in data.indices(step)})


def test_last_position_and_special_tokens_do_not_count(family, text, framed):
    plain = TrainingData(family("llama"), str(text), seq_len=12, batch=2, steps=1)
    assert plain.keep.tolist() == [True] * 11 + [False]
    data = TrainingData(framed, str(text), seq_len=12, batch=2, steps=1)
    assert data.keep.tolist() == [True] * 10 + [False] * 2  # position 10 predicts the token after the text
    ids = data.ids(0)
    assert data.kept(ids).shape == ids.shape and torch.equal(data.kept(ids)[1], data.keep)


def test_keeps_what_evaluate_scores(family, text, framed):
    for folder in (family("llama"), framed):
        data = TrainingData(folder, str(text), seq_len=12, batch=2, steps=1)
        windows, targets, _ = evaluate.cut_targets(folder, evaluate.Request(str(folder), str(text), seq_len=12))
        assert torch.equal(windows, data.windows)
        assert torch.equal(targets != evaluate.IGNORED, data.kept(windows))


def test_text_shorter_than_a_batch(family, tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("x" * 35)
    TrainingData(family("llama"), str(source), seq_len=10, batch=3, steps=9)
    with pytest.raises(
        TersorError, match=r"gives 3 windows of 10 tokens, one batch takes 4.*shorter than one batch"
    ) as error:
        TrainingData(family("llama"), str(source), seq_len=10, batch=4, steps=9)
    assert "lower --batch or --seq-len" in error.value.hint
    with pytest.raises(TersorError, match="gives 0 windows of 36 tokens"):
        TrainingData(family("llama"), str(source), seq_len=36, batch=1, steps=9)


def test_facts_tell_texts_and_tokenizers_apart(family, text, framed, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text("utf-8") + "x")  # too short a tail for another window
    make = lambda folder, source: TrainingData(folder, str(source), seq_len=50, batch=2, steps=1).facts()  # noqa: E731
    facts = make(family("llama"), text)
    assert facts == make(family("gpt2"), text)  # the same tokenizer
    assert {key for key, value in make(family("llama"), other).items() if value != facts[key]} <= {"text", "tokens"}
    assert make(family("llama"), other)["text"] != facts["text"]
    assert make(framed, text)["tokenizer"] != facts["tokenizer"] and make(framed, text)["text"] == facts["text"]


def test_too_few_embeddings(family, text):
    data = TrainingData(family("llama"), str(text), seq_len=50, batch=2, steps=1)
    highest = int(data.windows.max())
    data.require_vocabulary(highest + 1, text)
    with pytest.raises(TersorError, match=f"has {highest} embeddings, the text needs token {highest}"):
        data.require_vocabulary(highest, text)
