"""Iterators: the saved number is all there is; threads, workers and hosts change nothing."""

import copy
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from pisces_jax.data.packing import pipeline
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.data.sources import make_source
from pisces_jax.data.tokenizers import train_sentencepiece
from pisces_jax.shapes_world.source import corpus
from pisces_jax.utils.errors import UserError

LAYOUT = Layout(
    read_vectors=4, draw_vectors=4, length=96, rows=2, read_slots=4, draw_slots=4, read_size=16, draw_size=16
)
TASKS = {"caption": 1.0, "draw_caption": 2.0, "question": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(corpus(500), tmp_path_factory.mktemp("tokenizer") / "t.model", 700)


@pytest.fixture(scope="module")
def entries():
    return [
        make_source(dict(kind="shapes", name=task, weight=weight, task=task, num_examples=40, size=16))
        for task, weight in TASKS.items()
    ]


@pytest.fixture(params=["packed", "pairs"])
def open_iterator(request, entries, tokenizer):
    """Opens an iterator over batches of 4 whose tenth batch is well into the second epoch."""
    if request.param == "packed":
        items = PackedGroups(entries, tokenizer, LAYOUT, seed=0)
    else:
        items = Pairs(entries, tokenizer, 48, 16, seed=0, examples_per_epoch=30)
    assert items.per_epoch < 40
    return lambda **options: pipeline.batches(items, 4, **options)


def test_the_examples_of_a_batch_are_named(open_iterator, entries):
    """As many as the batch was made of, by source, number and key."""
    iterator = open_iterator()
    take(iterator, 9)
    before = iterator.seen
    take(iterator, 1)
    named = iterator.describe(9)
    assert len(named) == iterator.seen - before > 3
    sources = {entry.name: entry.source for entry in entries}
    for source, index, key in (re.fullmatch(r"(\w+)\[(\d+)\] (.*)", one).groups() for one in named):
        assert sources[source][int(index)].key == key


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_resumes_identically_for_any_number_of_threads(open_iterator):
    whole = take(open_iterator(threads=0), 14)
    for position in (0, 1, 7, 10):
        for before, after in ((0, 0), (2, 2), (0, 2), (2, 0)):
            first = open_iterator(threads=before)
            assert_same(take(first, position), whole[:position])
            state = json.loads(json.dumps(first.get_state()))
            assert state["next_batch"] == position and len(state) == 2
            first.close()
            second = open_iterator(threads=after)
            take(second, 3)  # a state may also be set on an iterator in use
            second.set_state(state)
            assert_same(take(second, 14 - position), whole[position:])
            second.close()


def test_a_state_of_other_data_is_refused(open_iterator, entries, tokenizer):
    iterator = open_iterator(threads=0)
    state = iterator.get_state()
    iterator.set_state({"next_batch": 5})  # as checkpoints had it before there was a digest
    assert iterator.get_state() == {**state, "next_batch": 5}
    # One example of 120 that cannot be read moves all others.
    items = iterator._source.items
    broken = copy.copy(items)
    tokens = np.array(items.lengths[1].tokens)
    tokens[17] = -1
    broken.lengths = [items.lengths[0], items.lengths[1]._replace(tokens=tokens), items.lengths[2]]
    with pytest.raises(UserError, match="not those of the checkpoint.*start anew in another --workdir"):
        pipeline.batches(broken, 4).set_state(state)
    pipeline.batches(items, 4).set_state(state)


def test_worker_processes_give_the_same_batches(entries, tokenizer, tmp_path):
    groups = PackedGroups(entries, tokenizer, LAYOUT, seed=0, folder=tmp_path)
    whole = take(pipeline.batches(groups, 4, threads=0), 9)
    iterator = pipeline.batches(groups, 4, workers=2)
    iterator.set_state({"next_batch": 4})
    assert_same(take(iterator, 5), whole[4:])
    assert iterator.get_state()["next_batch"] == 9
    iterator.close()
    copied = pickle.dumps(groups)
    assert b"lengths" in copied  # workers open the stored arrays; they are not sent to them


@pytest.mark.slow
def test_killed_at_every_tenth_position_the_tail_is_the_same(tmp_path, tokenizer):
    """Mixing and packing on, broken pictures among them; 1 and 2 hosts; 0, and at one position 1 and 4 workers."""
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"" if i == 7 else _png(i))
    lines = "".join(f'{{"file_name": "{i}.png", "text": "{"number " * (i % 5)}{i}"}}\n' for i in range(30))
    (tmp_path / "metadata.jsonl").write_text(lines)
    folder = dict(kind="image_folder", path=str(tmp_path), split="all", weight=3)
    entries = [
        make_source({**folder, "name": "read", "recipe": "caption"}),
        make_source({**folder, "name": "draw", "recipe": "draw_caption", "drop": 0.2}),
        make_source(dict(kind="shapes", task="question", num_examples=50, size=16, weight=4)),
    ]
    groups = PackedGroups(entries, tokenizer, LAYOUT, seed=3, examples_per_epoch=77)
    assert groups.per_epoch < 40  # the tail goes through several epochs
    whole = take(pipeline.batches(groups, 2, threads=0, max_broken=1), 30)
    other = PackedGroups(entries, tokenizer, LAYOUT, seed=3, examples_per_epoch=77)
    for position in range(0, 30, 10):
        first = pipeline.batches(groups, 2, threads=2, max_broken=1)
        take(first, position)
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        with_workers = ((1, 1), (4, 1)) if position == 10 or os.environ.get("PISCES_LONG_TESTS") else ()
        for workers, hosts in ((0, 1), (0, 2), *with_workers):
            readers = [
                pipeline.batches(other, 2, workers=workers, process_index=h, process_count=hosts, max_broken=1)
                for h in range(hosts)
            ]
            for reader in readers:
                reader.set_state(state)
            tails = [take(reader, 30 - position) for reader in readers]
            for reader in readers:
                reader.close()
            batches = zip(*tails, strict=True)
            joined = [{name: np.concatenate([a[name] for a in parts]) for name in parts[0]} for parts in batches]
            assert_same(joined, whole[position:])


def _png(i):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_run_stops_with_the_counts_when_too_much_is_broken(tmp_path, tokenizer):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"" if i % 2 else _png(i))
    (tmp_path / "20.png").unlink()
    lines = "".join(f'{{"file_name": "{i}.png", "text": "number {i}"}}\n' for i in range(40))
    (tmp_path / "metadata.jsonl").write_text(lines)
    entry = make_source(dict(kind="image_folder", path=str(tmp_path), recipe="caption"))
    groups = PackedGroups([entry], tokenizer, LAYOUT, seed=0)
    iterator = pipeline.batches(groups, 1, threads=2)
    # A share of the first thousand may always be broken, or the first broken one would stop the run.
    with pytest.raises(UserError, match=r"^1[0-9] of \d+ examples are broken: .*(decoded|missing) \(") as error:
        take(iterator, 1000)
    assert f"{tmp_path.name}/" in str(error.value) and "raise data.max_broken (now 0.01)" in str(error.value)
    assert iterator.broken.total() <= 14 and {reason for _, reason in iterator.broken} <= {
        "a picture cannot be decoded",
        "a picture is missing",
    }
    take(pipeline.batches(groups, 1, threads=0, max_broken=1.0), 3 * groups.per_epoch)
    # The same where texts are broken: known before the first batch.
    (tmp_path / "metadata.jsonl").write_text(lines + "{\n" * 30)
    entry = make_source(dict(kind="image_folder", path=str(tmp_path), recipe="caption"))
    for make in (
        lambda **more: PackedGroups([entry], tokenizer, LAYOUT, seed=0, **more),
        lambda **more: Pairs([entry], tokenizer, 48, 16, seed=0, **more),
    ):
        with pytest.raises(UserError, match=r"30 of 70 examples are broken \(not JSON: 30\), more than 1.00%.*/41"):
            make()
        make(max_broken=0.5)


def test_hosts_share_every_batch(open_iterator):
    whole = take(open_iterator(threads=0), 10)
    hosts = [take(open_iterator(process_index=host, process_count=2), 10) for host in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)]
    assert_same(joined, whole)
    with pytest.raises(UserError, match="not a multiple"):
        open_iterator(process_count=3)


def test_batches_are_stacked_groups(entries, tokenizer):
    groups = PackedGroups(entries, tokenizer, LAYOUT, seed=0)
    for b, batch in enumerate(take(pipeline.batches(groups, 4), 3)):
        for g in range(4):
            for name, value in groups[4 * b + g].items():
                np.testing.assert_array_equal(batch[name][g], value)


def test_one_pass_for_evaluation(entries, tokenizer):
    """Every example once; where sources have unequal weights, an epoch may round a length's share up or down."""
    entries = [entry._replace(weight=1.0) for entry in entries]
    groups = PackedGroups(entries, tokenizer, LAYOUT, seed=0, shuffle=False)
    iterator = pipeline.batches(groups, 4, one_pass=True)
    batches = list(iterator)
    assert len(batches) == len(iterator) == -(-groups.per_epoch // 4)
    starts = sum(int(((b["positions"] == 0) & (b["segment_ids"] > 0)).sum()) for b in batches)
    assert starts == sum(groups.counts) == 120
    beyond = 4 * len(batches) - groups.per_epoch
    assert not batches[-1]["segment_ids"][4 - beyond :].any()
    assert len(list(pipeline.batches(groups, 4, one_pass=True, num_batches=2))) == 2

    pairs = Pairs(entries, tokenizer, 48, 16, seed=0, examples_per_epoch=30, shuffle=False)
    batches = list(pipeline.batches(pairs, 4, one_pass=True))
    assert sum(int(batch["valid"].sum()) for batch in batches) == pairs.per_epoch


def test_pairs_hold_their_examples(entries, tokenizer):
    pairs = Pairs(entries, tokenizer, 48, 16, seed=0)
    for i in range(20):
        source, index = pairs.member(pairs.per_epoch + i)
        example = entries[source].source[index]
        pair = pairs[pairs.per_epoch + i]
        words = " ".join(part.text for part in example.parts if hasattr(part, "text"))
        (image,) = [part.array() for part in example.parts if hasattr(part, "role")]
        np.testing.assert_array_equal(pair["image"], image)
        ids = pair["tokens"][pair["text_mask"]]
        assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos and len(ids) <= 48
        assert tokenizer.decode(ids) == words and (pair["tokens"][len(ids) :] == tokenizer.pad).all()
        assert not {tokenizer.image, tokenizer.begin_image, tokenizer.end_image} & set(ids.tolist())
        assert pair["valid"] and pair["id"].dtype == np.uint32


def test_long_texts_are_left_out_of_pairs(entries, tokenizer):
    pairs = Pairs(entries[:2], tokenizer, 12, 16, seed=0)
    assert all(left_out["too_long"] > 0 and not left_out["no_picture"] for left_out in pairs.left_out.values())
    assert all(pairs[i]["text_mask"].sum() <= 12 for i in range(20))
    with pytest.raises(UserError, match="longer than 3 tokens.*: set data.text_length to at least"):
        Pairs(entries, tokenizer, 3, 16, seed=0)


def test_unreadable_pictures_are_counted_wherever_they_are_read(tmp_path, tokenizer):
    lines = "".join(f'{{"file_name": "{i}.png", "text": "number {i}"}}\n' for i in range(8))
    (tmp_path / "metadata.jsonl").write_text(lines)  # and no picture at all
    spec = dict(kind="image_folder", path=str(tmp_path), split="all", recipe="caption")
    groups = PackedGroups([make_source(spec)], tokenizer, LAYOUT, seed=0)
    iterator = pipeline.batches(groups, 1, one_pass=True)
    for batch in iterator:
        assert not batch["loss_mask"].any() and not batch["read_valid"].any() and batch["segment_ids"].any()
    assert len(iterator.broken) == 8 and set(iterator.broken.values()) == {1}
    iterator = pipeline.batches(Pairs([make_source(spec)], tokenizer, 48, 16, seed=0), 8, num_batches=1)
    (batch,) = iterator
    assert not batch["valid"].any() and not batch["text_mask"].any() and len(iterator.broken) == 8
