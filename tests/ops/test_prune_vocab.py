"""prune --remove vocab: rows of the tables, the tokenizer, and every id in between."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.text import default_text
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tersor.ops.prune.vocab.choose import choose_tokens
from tersor.ops.prune.vocab.token_ids import find_ids, map_ids
from tersor.ops.prune.vocab.vocabulary import Vocabulary
from tiny_models import BASE, BERT, FAMILIES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROWS = 704  # more than the tokenizers have, as padded tables do
TEXT = default_text()
SAMPLE = TEXT[:2_000]
UNSEEN = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 東京 🙂\n\n\tfoo_bar(baz=[1, 2]);"


def byte_pair() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[:200_000]], trainer)
    tokenizer.add_special_tokens(["<late>"])  # behind all others
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def characters() -> Tokenizer:
    """Byte pairs over characters with an end-of-word mark, old style."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[:200_000]], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=640, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:200_000]], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=640, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[:200_000]], trainer)
    return tokenizer


KINDS = {
    "byte-pair": (byte_pair, "llama", BASE, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<late>"}),
    "tied": (byte_pair, "llama-tied", BASE | {"tie_word_embeddings": True}, {"bos_token": "<s>"}),
    "head-bias": (byte_pair, "phi", FAMILIES["phi"][2], {"bos_token": "<s>"}),
    "characters": (characters, "gpt2", FAMILIES["gpt2"][2], {"unk_token": "<unk>"}),
    "word-piece": (
        word_piece, "bert-mlm", BERT,
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    ),
    "unigram": (unigram, "llama", BASE, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(kind) -> folder of a tiny float32 model with a trained tokenizer and more rows than that has tokens."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("vocab") / kind
            make, family, config, special = KINDS[kind]
            fast = transformers.PreTrainedTokenizerFast(tokenizer_object=make(), **special)
            ids = {f"{name}_id": fast.convert_tokens_to_ids(token) for name, token in special.items()}
            ids = {name: number for name, number in ids.items() if name[:3] in ("bos", "eos", "pad")}
            model_class, config_class, _ = FAMILIES[family]
            torch.manual_seed(0)
            built = getattr(transformers, model_class)(
                getattr(transformers, config_class)(**config | {"vocab_size": ROWS} | ids)
            )
            for name, parameter in built.named_parameters():
                torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.08)
            if built.can_generate() and "eos_token_id" in ids:
                built.generation_config.eos_token_id = [ids["eos_token_id"]]
            built.save_pretrained(folder)
            fast.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "sample.txt"
    path.write_text(SAMPLE, "utf-8")
    return path


def request(source, out, sample, **settings) -> Request:
    settings = {"sparsity": 0.3, "remove": "vocab"} | settings
    return Request(model=str(source), output=out, calib=str(sample), **settings)


def load(folder):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def tokenizer_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokens_of(folder) -> dict[str, int]:
    return tokenizer_of(folder).get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_have_the_same_logits(kind, model, sample, tmp_path):
    """The original, masked to the kept tokens, is the smaller model, on a text that both write with the same tokens."""
    source, out = model(kind), tmp_path / "out"
    report = prune(request(source, out, sample, sparsity=0.2))
    quality = report.quality["vocab"]
    assert quality["rows_after"] == ROWS - int(ROWS * 0.2) and quality["tokens_of_the_text_removed"] == 0
    assert quality["tokens_per_character_after"] == quality["tokens_per_character_before"]
    before, after = tokens_of(source), tokens_of(out)
    kept = torch.tensor([before[token] for token in sorted(after, key=after.get)])
    lines = [line for line in SAMPLE.splitlines() if len(line) > 40][:4]
    old_ids = [tokenizer_of(source)(line).input_ids[:100] for line in lines]
    new_ids = [tokenizer_of(out)(line).input_ids[:100] for line in lines]
    assert [[int(kept[number]) for number in row] for row in new_ids] == old_ids
    with torch.no_grad():
        for old, new in zip(old_ids, new_ids, strict=True):
            wanted = load(source)(input_ids=torch.tensor([old])).logits[..., kept]
            found = load(out)(input_ids=torch.tensor([new])).logits[..., : len(kept)]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_can_still_be_written(kind, model, sample, tmp_path):
    """Also with tokens of the text gone, and for text that was not counted."""
    source, out = model(kind), tmp_path / "out"
    _, steps = plan(request(source, out, sample))
    must = len(set().union(*(steps.details.vocabulary.closure(n) for n in steps.details.essential)))
    report = prune(request(source, out, sample, sparsity=1 - (must + 20) / ROWS))
    assert report.quality["vocab"]["tokens_of_the_text_removed"] > 0
    assert any("had to go" in warning for warning in report.warnings)
    assert (
        report.quality["vocab"]["tokens_per_character_after"] > report.quality["vocab"]["tokens_per_character_before"]
    )
    old, new = tokenizer_of(source), tokenizer_of(out)
    for text in (SAMPLE[:2000], TEXT[300_000:302_000], UNSEEN):
        assert new.decode(new(text).input_ids) == old.decode(old(text).input_ids)


def test_the_ids_follow(model, sample, tmp_path):
    source, out = model("byte-pair"), tmp_path / "out"
    before = tokens_of(source)
    prune(request(source, out, sample))
    after = tokens_of(out)
    assert after["<late>"] < before["<late>"]
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["pad_token_id"] == after["<late>"] and config["bos_token_id"] == after["<s>"]
    assert config["vocab_size"] == ROWS - int(ROWS * 0.3) and generation["eos_token_id"] == [after["</s>"]]
    assert generation["pad_token_id"] == after["<late>"]
    changed = {"vocab_size", "pad_token_id"}
    original = json.loads((source / "config.json").read_text())
    assert {key for key in config if config[key] != original[key]} == changed and config.keys() == original.keys()
    assert tokenizer_of(out)("the").input_ids[0] == after["<s>"]
    content = json.loads((out / "tokenizer.json").read_text())
    assert {token["content"]: token["id"] for token in content["added_tokens"]} == {
        token: after[token] for token in ("<s>", "</s>", "<late>")
    }


def test_templates_of_bert(model, sample, tmp_path):
    prune(request(model("word-piece"), tmp_path / "out", sample))
    after = tokens_of(tmp_path / "out")
    ids = tokenizer_of(tmp_path / "out")("the").input_ids
    assert (ids[0], ids[-1]) == (after["[CLS]"], after["[SEP]"])


def test_tables_heads_and_biases_are_cut_alike(model, sample, tmp_path):
    prune(request(model("head-bias"), tmp_path / "out", sample, multiple_of=64))
    before = load_file(model("head-bias") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    old, new = tokens_of(model("head-bias")), tokens_of(tmp_path / "out")
    rows = torch.tensor([old[token] for token in sorted(new, key=new.get)])
    for name, tensor in before.items():
        if ROWS in tensor.shape:
            assert after[name].shape[0] % 64 == 0
            assert torch.equal(after[name][: len(rows)], tensor[rows])
        else:
            assert torch.equal(after[name], tensor)
    assert {name for name in before if ROWS in before[name].shape} == {
        "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias",
    }  # fmt: skip


def test_every_kept_token_can_be_reached(model, sample, tmp_path):
    prune(request(model("byte-pair"), tmp_path / "out", sample, sparsity=0.4))
    old = Tokenizer.from_file(str(model("byte-pair") / "tokenizer.json"))
    new = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    decoder = decoders.ByteLevel()
    words = [decoder.decode([token]) for token in new.get_vocab() if not token.startswith("<")]
    words = [word for word in words if "\ufffd" not in word]
    assert len(words) > 200
    for word in words:
        assert new.encode(word, add_special_tokens=False).tokens == old.encode(word, add_special_tokens=False).tokens


def test_other_forms_of_the_vocabulary_are_left_out(model, sample, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in model("byte-pair").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "notes.md").write_text("kept")
    (source / "added_tokens.json").write_text(json.dumps({"<late>": tokens_of(source)["<late>"]}))
    report = prune(request(source, tmp_path / "out", sample))
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert (tmp_path / "out" / "notes.md").read_text() == "kept"
    assert any("merges.txt left out" in warning for warning in report.warnings)
    late = json.loads((tmp_path / "out" / "added_tokens.json").read_text())["<late>"]
    assert late == tokens_of(tmp_path / "out")["<late>"]


def test_same_bytes_twice_and_the_plan_knows_them(model, sample, tmp_path):
    for out in ("a", "b"):
        prune(request(model("unigram"), tmp_path / out, sample))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    _, steps = plan(request(model("unigram"), tmp_path / "c", sample))
    assert steps.nbytes == Checkpoint(tmp_path / "a").nbytes


def test_nothing_removed_changes_nothing(model, sample, tmp_path):
    prune(request(model("byte-pair"), tmp_path / "out", sample, sparsity=0.0))
    for name in ("tokenizer.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((model("byte-pair") / name).read_text())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choice_is_closed_and_of_the_asked_size(data):
    """Random merge trees: what stays has its parts, the essential tokens, and exactly the room."""
    size = data.draw(st.integers(4, 40))
    parts = {
        token: (data.draw(st.integers(0, token - 1)), data.draw(st.integers(0, token - 1))) for token in range(3, size)
    }
    counts = {token: data.draw(st.integers(0, 5)) for token in range(size)}
    rows = size + data.draw(st.integers(0, 4))

    def closure(token):
        return {token}.union(*(closure(part) for part in parts.get(token, ())))

    must = set(range(3)) | closure(data.draw(st.integers(0, size - 1)))
    room = data.draw(st.integers(len(must), rows))
    kept = choose_tokens(counts, set(range(size)), must, closure, room, rows)
    assert kept == sorted(set(kept)) and len(kept) == room and must <= set(kept)
    assert all(closure(token) <= set(kept) for token in kept if token < size)
    # The most frequent token that there is room for, with its parts, is never given up for others.
    order = sorted(set(range(size)) - must, key=lambda token: (-counts[token], token))
    first = next((token for token in order if len(must | closure(token)) <= room), None)
    assert first is None or first in kept


def test_a_token_brings_its_parts():
    tree = {4: {4, 3, 0}, 3: {3, 0}, 5: {5}, 0: {0}, 1: {1}, 2: {2}}
    assert choose_tokens({4: 9, 5: 1}, set(range(6)), {0}, tree.__getitem__, 3, 6) == [0, 3, 4]
    assert choose_tokens({4: 9, 5: 1}, set(range(6)), {0}, tree.__getitem__, 2, 6) == [0, 5]  # 4 does not fit


def test_the_last_merge_is_the_one_that_happens(tmp_path):
    """`abc` can be made in two ways; by itself it is written a+b first."""
    content = {
        "model": {
            "type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5},
            "merges": ["a b", "b c", "a bc", "ab c"],
        }
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    vocabulary = Vocabulary(tmp_path)
    assert vocabulary.parts[5] == (4, 2) and vocabulary.closure(5) == {0, 1, 2, 4, 5}
    rewritten = vocabulary.rewritten({0: 0, 1: 1, 2: 2, 4: 3, 5: 4})
    assert rewritten["model"]["merges"] == ["a b", "ab c"] and rewritten["model"]["vocab"]["abc"] == 4


def test_ids_in_settings():
    value = {
        "eos_token_id": [7, 3], "pad_token_id": None, "unk_token_id": -1, "num_layers": 7, "bad_words_ids": [[3, 7]],
        "forced_decoder_ids": [[1, 7]], "text_config": {"bos_token_id": 3}, "added_tokens_decoder": {"3": {"content": "x"}},
    }  # fmt: skip
    assert find_ids(value) == {7, 3, -1}
    mapped = map_ids(value, {7: 1, 3: 0})
    assert mapped == {
        "eos_token_id": [1, 0], "pad_token_id": None, "unk_token_id": -1, "num_layers": 7, "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 1]], "text_config": {"bos_token_id": 0}, "added_tokens_decoder": {"0": {"content": "x"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.9}, r"leaves 71 of 704 tokens, and \d+ tokens have to stay"),
        ({"sparsity": 0.0001}, "is less than one"),
        ({"multiple_of": 704}, "leaves all 704"),
        ({"include": ["embed"]}, "choose no tokens"),
        ({"method": "magnitude"}, "has no method"),
    ],
)
def test_bad_input(settings, message, model, sample, tmp_path):
    with pytest.raises(TersorError, match=message):
        prune(request(model("byte-pair"), tmp_path / "out", sample, **settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {"type": "WordLevel", "vocab": {"a": 0}}}'])
def test_tokenizers_that_cannot_be_cut(content, model, sample, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in model("byte-pair").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer.json").unlink()
    if content is not None:
        (source / "tokenizer.json").write_text(content)
    with pytest.raises(TersorError, match=r"tokenizer"):
        prune(request(source, tmp_path / "out", sample))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
