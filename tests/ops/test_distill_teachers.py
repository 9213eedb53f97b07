"""In memory, block by block or from a file: a teacher says the same."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers
from tersor.formats.errors import TersorError
from tersor.formats.teacher_logits import RELATIVE_ERROR, bytes_per_token
from tersor.formats.units import size
from tersor.ops.distill.data import TrainingData
from tersor.ops.distill.losses.layer_map import layer_map
from tersor.ops.distill.losses.objective import Objective
from tersor.ops.distill.losses.parse import parse_loss
from tersor.ops.distill.teachers import choose as choosing
from tersor.ops.distill.teachers.cached import Cached, write_cache
from tersor.ops.distill.teachers.choose import choose, open_teacher, teacher_bytes
from tersor.ops.distill.teachers.in_process import InProcess
from tersor.ops.distill.teachers.streamed import Streamed
from tersor.ops.distill.teachers.targets import Wanted, rows_of
from tersor.ops.model import blocks
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tiny_models import FAMILIES

FOUR = ["llama", "gpt2", "gemma", "mixtral"]
ALL = Wanted(blocks=(0, 1), attention=(1,))
SEQ_LEN = 24


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(blocks, "TOKENS_PER_BATCH", 4 * SEQ_LEN)


@pytest.fixture
def data(family, text):
    def make(batch=3, steps=6, seed=0, seq_len=SEQ_LEN, source=text) -> TrainingData:
        return TrainingData(family("llama"), str(source), seq_len, batch, steps, seed)

    return make


def close(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def logits(targets):
    return targets.head.logits(targets.hidden.flatten(0, 1)).unflatten(0, targets.hidden.shape[:2])


@pytest.mark.parametrize("name", FOUR)
def test_in_process_is_the_whole_model(name, family, data):
    folder = family(name)
    teacher, ids = InProcess(folder, ALL, "cpu"), data().ids(0)
    targets = teacher.targets(0, ids)
    model = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
    close(logits(targets), whole.logits)
    close(targets.blocks[0], whole.hidden_states[1])
    assert targets.blocks.keys() == {0, 1} and targets.attention.keys() == {1}
    assert {kind: tuple(x.shape[:2]) for kind, x in targets.attention[1].items()} == dict.fromkeys("qkv", ids.shape)
    assert (teacher.vocabulary, teacher.blocks, teacher.hidden_size) == (256, 2, 64)
    assert not any(x.requires_grad for x in (targets.hidden, *targets.blocks.values(), *targets.attention[1].values()))


@pytest.mark.parametrize("name", FOUR)
def test_streamed_gives_what_in_process_gives(name, family, data):
    folder, windows = family(name), data()
    streamed, whole = Streamed(folder, ALL, windows, "cpu"), InProcess(folder, ALL, "cpu")
    for step in range(6):
        ids = windows.ids(step)
        found, expected = streamed.targets(step, ids), whole.targets(step, ids)
        close(found.hidden, expected.hidden)
        close(logits(found), logits(expected))
        for index in ALL.blocks:
            close(found.blocks[index], expected.blocks[index])
        for kind in "qkv":
            close(found.attention[1][kind], expected.attention[1][kind])
    assert streamed.passes == 1
    assert (streamed.vocabulary, streamed.blocks, streamed.hidden_size) == (256, 2, 64)
    assert streamed.fingerprint == whole.fingerprint


@pytest.mark.parametrize("name", FOUR)
def test_cached_gives_the_top_of_it(name, family, data, tmp_path):
    folder, windows, path = family(name), data(), tmp_path / "cache.safetensors"
    teacher = Streamed(folder, Wanted(), windows, "cpu")
    write_cache(teacher, windows, path, k=8, temperature=2.0)
    cached, whole = Cached(path, Wanted(), windows), InProcess(folder, Wanted(), "cpu")
    assert cached.fingerprint == whole.fingerprint and cached.vocabulary == 256
    for step in (4, 0):
        ids = windows.ids(step)[1:]
        top = cached.targets(step, ids).top_k
        logs = (logits(whole.targets(step, ids)) / 2.0).log_softmax(-1)
        exact, order = logs.topk(8, -1)
        rest = logs.scatter(-1, order, float("-inf")).logsumexp(-1)
        assert top.temperature == 2.0 and torch.equal(top.indices.sort(-1)[0].long(), order.sort(-1)[0])
        for found, expected in ((top.values, exact), (top.log_rest, rest)):
            assert bool(((found - expected).abs() <= RELATIVE_ERROR * expected.abs() + 1e-5).all())


def test_a_micro_batch_is_any_rows_of_the_step(family, data, tmp_path):
    windows, path = data(batch=5), tmp_path / "cache.safetensors"
    whole, streamed = (InProcess(family("llama"), ALL, "cpu"), Streamed(family("llama"), ALL, windows, "cpu"))
    write_cache(whole, windows, path, k=4)
    cached, ids = Cached(path, Wanted(), windows), windows.ids(2)
    full, top = streamed.targets(2, ids), cached.targets(2, ids).top_k
    for rows in ([0], [3, 4], [4, 0, 2]):
        part = streamed.targets(2, ids[rows])
        assert torch.equal(part.hidden, full.hidden[rows]) and torch.equal(part.blocks[1], full.blocks[1][rows])
        assert torch.equal(part.attention[1]["v"], full.attention[1]["v"][rows])
        assert torch.equal(cached.targets(2, ids[rows]).top_k.indices, top.indices[rows])
    with pytest.raises(ValueError, match="none of the step's windows"):
        streamed.targets(2, ids + 1)


def test_the_same_bits_however_many_steps_a_pass_serves(family, data):
    """A small cap, a large one, and a run that begins in the middle."""
    windows = data(batch=3, steps=13)
    results = []
    for room, first in ((1, 0), (900_000, 0), (1 << 30, 0), (1, 7), (1 << 30, 7)):
        teacher = Streamed(family("llama"), Wanted(blocks=(0,), attention=(1,)), windows, "cpu")
        teacher._room = room
        found = {step: teacher.targets(step, windows.ids(step)) for step in range(first, 13)}
        results.append((teacher, found))
    (smallest, exact), *others = results
    assert smallest.spilled_bytes > 0  # of passes before the last
    for _, found in others:
        for step, targets in found.items():
            assert torch.equal(targets.hidden, exact[step].hidden)
            assert torch.equal(targets.blocks[0], exact[step].blocks[0])
            assert all(torch.equal(targets.attention[1][kind], exact[step].attention[1][kind]) for kind in "qkv")
    # 4 windows go through a block together and a step has 3: passes serve 4 steps, or a multiple of that.
    assert [teacher.passes for teacher, _ in results] == [4, 2, 1, 3, 1]


def test_max_memory_decides_how_many_steps_a_pass_serves(family, data):
    windows = data(batch=4, steps=50)
    teacher = Streamed(family("llama"), Wanted(), windows, "cpu")
    assert teacher.step_bytes == 2 * 4 * 4 * SEQ_LEN * 64  # from block to block, and kept; float32
    teacher._room = 5 * teacher.step_bytes
    for step in range(50):
        teacher.targets(step, windows.ids(step))
        assert len(teacher._steps) == 5 and teacher._pool.peak_spilled_bytes == 0
    assert teacher.passes == 10


def test_streaming_holds_one_block(family, data, monkeypatch):
    full, most, filled = 0, 0, []
    original = Skeleton.filled

    @contextmanager
    def counted(self, index):
        nonlocal full, most
        with original(self, index) as block:
            full, most = full + 1, max(most, full + 1)
            others = [other for other in self.blocks if other is not block]
            assert all(parameter.is_meta for other in others for parameter in other.parameters())
            filled.append(index)
            yield block
            full -= 1

    monkeypatch.setattr(Skeleton, "filled", counted)
    windows = data(steps=4)
    teacher = Streamed(family("llama", num_hidden_layers=4), Wanted(blocks=(1,), attention=(2,)), windows, "cpu")
    for step in range(4):
        teacher.targets(step, windows.ids(step))
    assert most == 1 and filled == [0, 1, 2, 3]
    assert all(parameter.is_meta for block in teacher.skeleton.blocks for parameter in block.parameters())


def test_blocks_after_the_last_one_wanted_are_not_run(family, data, monkeypatch):
    filled = []
    original = Skeleton.filled
    monkeypatch.setattr(Skeleton, "filled", lambda self, index: filled.append(index) or original(self, index))
    windows, wanted = data(steps=2), Wanted(logits=False, blocks=(1,))
    folder = family("llama", num_hidden_layers=4)
    teacher = Streamed(folder, wanted, windows, "cpu")
    targets = teacher.targets(0, windows.ids(0))
    expected = InProcess(folder, wanted, "cpu").targets(0, windows.ids(0))
    assert filled == [0, 1] and targets.hidden is None and expected.hidden is None and teacher.vocabulary is None
    close(targets.blocks[1], expected.blocks[1])


@pytest.mark.parametrize("mode", ["in-process", "streamed"])
def test_encoders_have_blocks_to_compare(mode, family, text):
    folder, wanted = family("bert"), Wanted(logits=False, blocks=(0, 1))
    windows = TrainingData(folder, str(text), SEQ_LEN, batch=2, steps=1)
    teacher = InProcess(folder, wanted, "cpu") if mode == "in-process" else Streamed(folder, wanted, windows, "cpu")
    targets, ids = teacher.targets(0, windows.ids(0)), windows.ids(0)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        close(targets.blocks[1], model(ids).last_hidden_state)
    with pytest.raises(TersorError, match="BertModel"):
        if mode == "in-process":
            InProcess(folder, Wanted(), "cpu")
        else:
            Streamed(folder, Wanted(), windows, "cpu")


@pytest.mark.parametrize("mode", ["in-process", "streamed"])
@pytest.mark.parametrize("name", ["bert-mlm", "opt", "phi", "llama-tied", "gemma3"])
def test_heads_of_other_kinds(mode, name, family, text):
    """A transform before the head, a bias, tied tables."""
    folder = family(name)
    windows = TrainingData(folder, str(text), SEQ_LEN, batch=2, steps=1)
    ids = windows.ids(0)
    teacher = InProcess(folder, Wanted(), "cpu") if mode == "in-process" else Streamed(folder, Wanted(), windows, "cpu")
    model = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        close(logits(teacher.targets(0, ids)), model(ids).logits)


@pytest.mark.parametrize("mode", ["in-process", "streamed", "cached"])
def test_the_losses_take_targets_as_they_are(mode, family, data, tmp_path):
    """The very model as its student: losses of 0, but for the rounding of a cache."""
    folder, windows = family("llama"), data(steps=1)
    wanted, loss = (
        (Wanted(), "kl") if mode == "cached" else (Wanted(blocks=(0, 1), attention=(0, 1)), "kl,hidden,attention")
    )
    student, ids = InProcess(folder, wanted, "cpu"), windows.ids(0)
    if mode == "cached":
        write_cache(student, windows, tmp_path / "cache.safetensors", k=16)
        teacher = Cached(tmp_path / "cache.safetensors", wanted, windows)
    else:
        teacher = student if mode == "in-process" else Streamed(folder, wanted, windows, "cpu")
    objective = Objective(parse_loss(loss), layers=layer_map(None, 2, 2), widths=(64, 64))
    own, targets = student.targets(0, ids), teacher.targets(0, ids)
    total, parts = objective(ids, windows.kept(ids), own.hidden, own.head, targets, own, targets)
    tokens = int(windows.kept(ids).sum())
    assert parts.keys() == {term.name for term in parse_loss(loss)}
    assert 0 <= float(total) / tokens < 1e-5
    worse, _ = objective(ids, windows.kept(ids), own.hidden.roll(1, 1), own.head, targets, own, targets)
    assert float(worse) > 1000 * float(total)


def test_a_quantized_teacher(family, data, tmp_path):
    """Blocks without a dense layer in them are found, and both ways decode the same weights."""
    quantize(QuantizeRequest(str(family("llama")), tmp_path / "small", "w4a16", group_size=32, device="cpu"))
    windows = data(steps=1)
    ids = windows.ids(0)
    found = Streamed(tmp_path / "small", ALL, windows, "cpu").targets(0, ids)
    expected = InProcess(tmp_path / "small", ALL, "cpu").targets(0, ids)
    close(logits(found), logits(expected))
    close(found.blocks[0], expected.blocks[0])
    close(found.attention[1]["k"], expected.attention[1]["k"])
    assert not torch.allclose(
        expected.hidden, InProcess(family("llama"), ALL, "cpu").targets(0, ids).hidden, 0.01, 0.01
    )


def test_cache_holds_each_window_once(family, data, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text(text.read_text("utf-8")[: 10 * SEQ_LEN])
    windows, path = data(batch=4, steps=9, source=short), tmp_path / "cache.safetensors"
    asked = []

    class Counting(InProcess):
        def targets(self, step, ids):
            asked.extend(map(tuple, ids.tolist()))
            return super().targets(step, ids)

    facts = write_cache(Counting(family("llama"), Wanted(), "cpu"), windows, path, k=4)
    count = len(windows.windows)
    assert len(asked) == len(set(asked)) == count < 4 * 9
    assert path.stat().st_size < count * SEQ_LEN * bytes_per_token(facts.k, facts.vocabulary) + 8 * count + 2000
    # All windows are there, so that the order, which the seed decides, does not matter.
    other = data(batch=3, steps=20, seed=7, source=short)
    Cached(path, Wanted(), other).targets(19, other.ids(19))


def test_cache_stops_at_the_common_vocabulary(family, data, tmp_path):
    windows, path = data(steps=1), tmp_path / "cache.safetensors"
    teacher = InProcess(family("llama"), Wanted(), "cpu")
    write_cache(teacher, windows, path, k=8, vocabulary=100)
    top = Cached(path, Wanted(), windows).targets(0, windows.ids(0)).top_k
    logs = logits(teacher.targets(0, windows.ids(0)))[..., :100].log_softmax(-1)
    assert int(top.indices.max()) < 100
    close(top.values, logs.topk(8, -1)[0], 2 * RELATIVE_ERROR)
    with pytest.raises(TersorError, match=r"--top-k 101: .* 100 entries in common"):
        write_cache(teacher, windows, path, k=101, vocabulary=100, force=True)


def test_caches_of_other_runs_are_refused(family, data, tmp_path):
    windows, path = data(batch=2, steps=3), tmp_path / "cache.safetensors"
    write_cache(InProcess(family("llama"), Wanted(), "cpu"), windows, path, k=4)
    other = tmp_path / "other.txt"
    other.write_text("Nothing of the kind. " * 100)
    Cached(path, Wanted(), data(batch=2, steps=2))
    Cached(path, Wanted(), data(batch=3, steps=2))  # the same six windows
    cases = {
        "another text": data(batch=2, steps=3, source=other),
        "--seq-len 24, this run has 20": data(batch=2, steps=3, seq_len=20),
        "lacks 2 of the 8 windows .*--seed 0 --batch 2 --steps 3": data(batch=2, steps=4),
        "lacks .* --seed 1": data(batch=2, steps=3, seed=1),
    }
    for message, run in cases.items():
        with pytest.raises(TersorError, match=message):
            Cached(path, Wanted(), run)
    with pytest.raises(TersorError, match="holds logits only") as error:
        Cached(path, Wanted(blocks=(0,)), windows)
    assert "--teacher" in error.value.hint


@pytest.mark.parametrize(
    "make", [lambda *a: InProcess(*a[:2], "cpu"), lambda *a: Streamed(*a, "cpu")], ids=["whole", "streamed"]
)
def test_a_block_that_is_not_there(make, family, data):
    with pytest.raises(TersorError, match="has no block 2") as error:
        make(family("llama"), Wanted(blocks=(0, 2)), data())
    assert "0 to 1" in error.value.hint


def test_too_little_memory_is_said_before_the_work(family, data):
    with pytest.raises(TersorError, match="--max-memory 1000 bytes is"):
        Streamed(family("llama"), Wanted(), data(), "cpu", max_memory_bytes=1000)
    with pytest.raises(TersorError, match=r"the student .* do not fit together") as error:
        Streamed(family("llama"), Wanted(), data(), "cpu", max_memory_bytes=1 << 40, student_bytes=1 << 41)
    assert "--cache-teacher" in error.value.hint


def test_rows_of_equal_windows():
    step = torch.tensor([[1, 2], [3, 4], [1, 2]])
    assert rows_of(step, torch.tensor([[3, 4], [1, 2]])) == [1, 0]


def test_auto_takes_what_fits(family, data, monkeypatch):
    folder = str(family("llama"))
    needed = teacher_bytes(family("llama"), torch.device("cpu"))
    assert needed == sum(4 * x.numel() for x in InProcess(family("llama"), Wanted(), "cpu").model.parameters())
    monkeypatch.setattr(choosing, "free_bytes", lambda device: 2 * needed)
    assert choose(folder, device="cpu").mode == "in-process"
    assert choose(folder, device="cpu", student_bytes=needed // 2).mode == "in-process"
    beside = choose(folder, device="cpu", student_bytes=needed)
    assert (
        beside.mode == "streamed" and size(needed) in beside.why and f"more than the {size(2 * needed)}" in beside.why
    )
    monkeypatch.setattr(choosing, "resident_bytes", lambda: 1000)
    capped = choose(folder, device="cpu", max_memory_bytes=needed)
    assert capped.mode == "streamed" and "--max-memory leaves" in capped.why
    assert choose(folder, device="cpu", max_memory_bytes=2 * needed).mode == "in-process"
    assert choose(folder, "streamed", "cpu").mode == "streamed" and "--teacher-mode" in choose(folder, "streamed").why


def test_every_mode_opens(family, data, tmp_path):
    windows, path = data(steps=1), tmp_path / "cache.safetensors"
    folder = str(family("llama"))
    for mode in ("in-process", "streamed"):
        teacher = open_teacher(folder, choose(folder, mode), Wanted(), windows, "cpu")
        assert teacher.mode == mode
    write_cache(teacher, windows, path, k=4)
    choice = choose(str(path))
    assert choice.mode == "cached" and path.name in choice.why
    assert open_teacher(str(path), choice, Wanted(), windows).mode == "cached"


def test_modes_that_do_not_fit_are_refused(family, data, tmp_path):
    windows, path = data(steps=1), tmp_path / "cache.safetensors"
    folder = str(family("llama"))
    write_cache(InProcess(family("llama"), Wanted(), "cpu"), windows, path, k=4)
    for teacher, mode, message in (
        (folder, "fast", "--teacher-mode fast: no such mode"),
        (folder, "cached", "no file of cached logits"),
        (str(path), "streamed", "holds cached logits"),
    ):
        with pytest.raises(TersorError, match=message):
            choose(teacher, mode)
    small = str(family("llama", vocab_size=64))
    for mode in ("in-process", "streamed"):
        with pytest.raises(TersorError, match="has 64 embeddings, the text needs token") as error:
            open_teacher(small, choose(small, mode), Wanted(), windows, "cpu")
        assert "tokenizer" in error.value.hint
