"""Packing, against an obvious reference that reads the rows back."""

import collections
import dataclasses
import pickle

import numpy as np
import pytest
import tiny
from safetensors import SafetensorError

from pisces_jax.data import arrays as arrays_module
from pisces_jax.data.arrays import read_arrays, write_arrays
from pisces_jax.data.example import TRANSIENT, BrokenExample, Example, Picture, Text, identity
from pisces_jax.data.images import UnreadablePicture
from pisces_jax.data.packing import epochs, lengths
from pisces_jax.data.packing.binning import pack
from pisces_jax.data.packing.layout import Entry, Layout, lay_out
from pisces_jax.data.packing.lengths import Lengths, scan_lengths
from pisces_jax.data.packing.mixture import Mixture, mixture_counts, shuffled
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.shapes_world.source import ShapesSource
from pisces_jax.utils.errors import UserError

LAYOUT = Layout(read_vectors=5, draw_vectors=3, length=40, rows=3, read_slots=5, draw_slots=4, read_size=8, draw_size=6)


class Letters:
    """A tokenizer of one id a character."""

    pad, bos, eos, begin_image, end_image, image = range(6)
    vocab_size = 200
    fingerprint = "letters"
    end_of_turn = None
    opening, before_picture = (bos,), ()

    def header(self, speaker):
        return []

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i >= 6)


def plain(value, size):
    """A picture whose every pixel says which one it is."""
    return lambda: np.full((size, size, 3), value % 256, np.uint8)


def unreadable():
    raise UnreadablePicture("picture x cannot be read: replace it")


class Words:
    """Examples of all forms, with texts of uneven lengths; those in `broken` have a picture that fails."""

    draws, remote, fingerprint, pictures_fingerprint = True, False, "", None

    def __init__(self, name, n, forms=("read", "draw", "text", "edit", "described"), broken=()):
        self.name, self.n, self.forms, self.broken = name, n, forms, broken

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        words = f"{self.name}{i}" + "abcdefghij"[: i * 7 % 10]
        form = self.forms[i % len(self.forms)]
        make = unreadable if i in self.broken else None
        parts = {
            "read": (Picture(make or plain(i, 8), "read"), Text("q:"), Text(words, learn=True)),
            "draw": (Text(words), Picture(make or plain(i, 6), "draw")),
            "text": (Text("t:"), Text(words, learn=True)),
            "edit": (Picture(plain(i, 8), "read"), Text(words), Picture(make or plain(i + 1, 6), "draw")),
            "described": (Text("d:"), Text(words, learn=True), Picture(make or plain(i, 6), "draw")),
        }[form]
        return Example(parts, f"{self.name}/{i}")


def two_sources(**options):
    entries = [Entry("a", 3.0, Words("a", 60)), Entry("b", 1.0, Words("b", 37, ("draw", "read")))]
    return PackedGroups(entries, Letters(), LAYOUT, seed=5, **options)


def segments(group):
    """Every segment of a group, read back from the arrays alone: (source, tokens, learn, row, start)."""
    for row in range(group["tokens"].shape[0]):
        ids = group["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            assert (np.diff(places) == 1).all()  # in one piece
            assert group["positions"][row, places].tolist() == list(range(len(places)))
            (source,) = set(group["source"][row, places].tolist())
            yield source, group["tokens"][row, places], group["loss_mask"][row, places], row, places[0]
        padding = ids == 0
        assert (group["tokens"][row, padding] == Letters.pad).all() and not group["loss_mask"][row, padding].any()
        assert (group["source"][row, padding] == -1).all() and not group["positions"][row, padding].any()


def test_lay_out_by_hand():
    t = Letters()
    b, e, i, o, c = t.bos, t.eos, t.image, t.begin_image, t.end_image
    picture = plain(0, 8)

    def check(parts, tokens, learn, places):
        got = lay_out(Example(tuple(parts), "k"), t, LAYOUT)
        assert got.tokens.tolist() == tokens and got.tokens.dtype == np.int32
        assert got.loss_mask.astype(int).tolist() == learn and got.loss_mask.dtype == bool
        assert [(p.role, p.start, p.ordinal) for p in got.pictures] == places

    q, a = ord("Q"), ord("A")
    check([Text("QQ"), Text("A", learn=True)], [b, q, q, a, e], [0, 0, 0, 1, 1], [])
    check(
        [Picture(picture, "read"), Text("Q"), Text("AA", learn=True)],
        [b, i, i, i, i, i, q, a, a, e],
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        [("read", 1, 0)],
    )
    # Drawing was asked for: neither the mark nor the end is learned.
    check([Text("Q"), Picture(picture, "draw")], [b, q, o, i, i, i, c, e], [0] * 8, [("draw", 3, 1)])
    # The model wrote a description and then chose to draw.
    check(
        [Text("Q"), Text("A", learn=True), Picture(picture, "draw")],
        [b, q, a, o, i, i, i, c, e],
        [0, 0, 1, 1, 0, 0, 0, 0, 0],
        [("draw", 4, 2)],
    )
    # A picture between an answer and the end: the end is not learned.
    check(
        [Text("A", learn=True), Picture(picture, "read")],
        [b, a, i, i, i, i, i, e],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [("read", 2, 1)],
    )


def test_an_epoch_holds_every_example_once_and_nothing_else():
    source = Words("a", 137)
    groups = PackedGroups([Entry("a", 1.0, source)], Letters(), LAYOUT, seed=1)
    for epoch in (0, 1):
        first = epoch * groups.per_epoch
        seen, ids = collections.Counter(), collections.Counter()
        for i in range(first, first + groups.per_epoch):
            group = groups[i]
            for _, tokens, learn, _, _ in segments(group):
                seen[tokens.tobytes(), learn.tobytes()] += 1
            for role in ("read", "draw"):
                ids.update(map(tuple, group[f"{role}_id"][group[f"{role}_valid"]].tolist()))
        expected, expected_ids = collections.Counter(), collections.Counter()
        for i in range(len(source)):
            laid_out = lay_out(source[i], Letters(), LAYOUT)
            expected[laid_out.tokens.tobytes(), laid_out.loss_mask.tobytes()] += 1
            for placed in laid_out.pictures:
                expected_ids[tuple(identity(1, epoch, source[i].key, placed.ordinal).tolist())] += 1
        assert seen == expected
        assert ids == expected_ids and max(ids.values()) == 1


def test_pictures_are_where_their_pointers_say():
    groups = two_sources()
    for i in range(12):
        group = groups[i]
        vectors = np.zeros(group["tokens"].shape, int)
        for role, n, size in (("read", LAYOUT.read_vectors, 8), ("draw", LAYOUT.draw_vectors, 6)):
            slots = len(group[f"{role}_valid"])
            assert group[f"{role}_images"].shape == (slots, size, size, 3)
            for slot in range(slots):
                row, start = int(group[f"{role}_row"][slot]), int(group[f"{role}_start"][slot])
                if not group[f"{role}_valid"][slot]:
                    assert group[f"{role}_source"][slot] == -1 and not group[f"{role}_images"][slot].any()
                    continue
                vectors[row, start : start + n] += 1
                assert group[f"{role}_source"][slot] == group["source"][row, start]
                if role == "draw":
                    assert group["tokens"][row, start - 1] == Letters.begin_image
                    assert group["tokens"][row, start + n] == Letters.end_image
                # The picture is that of the example whose text surrounds it (its number is in the text).
                segment = group["segment_ids"][row] == group["segment_ids"][row, start]
                text = Letters().decode(group["tokens"][row, segment])
                number = int("".join(letter for letter in text if letter.isdigit()))
                edits = role == "draw" and (group["tokens"][row, segment][1] == Letters.image)
                assert (group[f"{role}_images"][slot] == (number + int(edits)) % 256).all()
        assert (vectors == (group["tokens"] == Letters.image)).all()


def test_shapes_and_types_are_fixed():
    groups = two_sources()
    expected = {name: (value.shape, value.dtype) for name, value in groups.empty().items()}
    g, t, r, d = LAYOUT.rows, LAYOUT.length, LAYOUT.read_slots, LAYOUT.draw_slots
    assert expected["tokens"] == ((g, t), np.int32) and expected["loss_mask"] == ((g, t), bool)
    assert expected["read_images"] == ((r, 8, 8, 3), np.uint8) and expected["draw_id"] == ((d, 2), np.uint32)
    assert len(expected) == 5 + 2 * 6
    for i in range(5):
        assert {name: (value.shape, value.dtype) for name, value in groups[i].items()} == expected


@pytest.mark.parametrize("rows, reads, draws", [(1, 2, 2), (4, 6, 3), (8, 30, 30)])
def test_budgets_hold_for_any_lengths(rows, reads, draws):
    rng = np.random.default_rng(rows)
    layout = Layout(1, 1, 64, rows, reads, draws, 1, 1)
    tokens, r, d = rng.integers(1, 65, 3000), rng.integers(0, 3, 3000), rng.integers(0, 3, 3000)
    bins = pack(tokens, r, d, layout)
    used = np.zeros((bins.num_groups, rows, 64), int)
    for i in range(len(tokens)):
        assert bins.offset[i] + tokens[i] <= 64
        used[bins.group[i], bins.row[i], bins.offset[i] : bins.offset[i] + tokens[i]] += 1
    assert used.max() == 1  # no two on one place
    assert used.any(axis=(1, 2)).all()  # no group is empty
    assert np.bincount(bins.group, r).max() <= reads and np.bincount(bins.group, d).max() <= draws
    # Best fit over many open groups is about as good as if all stayed open.
    best = pack(tokens, r, d, layout, open_rows=10**9)
    assert bins.num_groups <= 1.1 * best.num_groups


def test_packing_is_full_when_pictures_do_not_limit():
    rng = np.random.default_rng(0)
    tokens, none = rng.integers(20, 80, 20_000), np.zeros(20_000, int)
    bins = pack(tokens, none, none, Layout(1, 1, 256, 4, 0, 0, 1, 1))
    assert tokens.sum() / (bins.num_groups * 4 * 256) > 0.95  # the least share the project asks for


def test_shuffled_is_a_permutation():
    for n in (1, 2, 3, 255, 256, 257, 70_000):
        whole = shuffled(np.arange(n), n, "key", 3)
        assert sorted(whole.tolist()) == list(range(n))
        assert shuffled(np.arange(n)[n // 2 :], n, "key", 3).tolist() == whole[n // 2 :].tolist()
    # Looks random: few fixed points, no correlation of neighbours; another key gives another order.
    assert (whole == np.arange(n)).sum() < 10
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.02
    assert (whole == shuffled(np.arange(n), n, "key", 4)).sum() < 10


def test_mixture_shares_and_passes():
    usable = [np.arange(0, 100), np.arange(500, 530), np.array([7])]
    names, sizes = ["a", "b", "c"], [len(each) for each in usable]
    counts = mixture_counts(names, [5.0, 4.0, 1.0], sizes, examples_per_epoch=40)
    assert counts == [20, 16, 4]
    mixture = Mixture(names, counts, usable, seed=0)
    taken = [[], [], []]
    for epoch in range(15):
        source, index = mixture.at(epoch, np.arange(40))
        assert np.bincount(source).tolist() == [20, 16, 4]
        for place in (0, 7, 39):  # any part of it alone is the same
            alone = mixture.at(epoch, np.array([place]))
            assert (alone[0] == source[place]).all() and (alone[1] == index[place]).all()
        for s in range(3):
            taken[s] += index[source == s].tolist()
    # 15 epochs are three whole passes over a, eight over b, sixty over c.
    for s, passes in enumerate((3, 8, 60)):
        assert collections.Counter(taken[s]) == dict.fromkeys(usable[s].tolist(), passes)
    # Within every pass over a (five epochs) each example comes once, and the passes differ in order.
    for start in (0, 100, 200):
        assert len(set(taken[0][start : start + 100])) == 100
    assert taken[0][:100] != taken[0][100:200]
    with pytest.raises(UserError, match="same name"):
        mixture_counts(["a", "a"], [1, 1], sizes[:2])
    with pytest.raises(UserError, match="weights"):
        mixture_counts(["a", "b"], [0, 0], sizes[:2])
    with pytest.raises(UserError, match="no example of source b can be used"):
        mixture_counts(["a", "b"], [1, 1], [3, 0])
    with pytest.raises(UserError, match="examples_per_epoch"):
        mixture_counts(names, [1, 1, 1], sizes, examples_per_epoch=1)


def test_unshuffled_mixture_is_in_order_and_even():
    mixture = Mixture(["a", "b"], [60, 20], [np.arange(60), np.arange(20)], 0, shuffle=False)
    source, index = mixture.at(0, np.arange(80))
    assert index[source == 0].tolist() == list(range(60)) and index[source == 1].tolist() == list(range(20))
    assert np.bincount(source[:8]).tolist() == [6, 2]


def test_groups_are_a_pure_function_of_seed_and_number():
    one, two = two_sources(), two_sources()
    total = 3 * one.per_epoch
    numbers = list(range(total))
    in_order = [one[i] for i in numbers]
    np.random.default_rng(0).shuffle(numbers)
    for i in numbers:  # another object, in any order
        for name, value in two[i].items():
            np.testing.assert_array_equal(value, in_order[i][name], err_msg=f"group {i}, {name}")
    other = PackedGroups(one.entries, Letters(), LAYOUT, seed=6)
    assert any((other[i]["tokens"] != in_order[i]["tokens"]).any() for i in range(3))
    copied = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(copied[total]["tokens"], two[total]["tokens"])


def test_left_out_examples_are_counted_by_reason(caplog):
    class Odd(Words):
        def __getitem__(self, i):
            if i == 3:
                return Example((Text("x" * 60),), "long")
            if i == 4:
                return Example(tuple(Picture(plain(0, 6), "draw") for _ in range(5)), "many")
            if i == 5:
                raise UserError("broken record")
            return super().__getitem__(i)

    groups = PackedGroups([Entry("odd", 1, Odd("odd", 20))], Letters(), LAYOUT, seed=0)
    assert groups.left_out == {"odd": {"too_long": 1, "too_many_pictures": 1, "unreadable": 1}}
    assert (
        "source odd: left out of 20 examples: 1 longer than 40 tokens, 1 with more pictures than a group has slots, "
        "1 unreadable (unreadable: 1)"
    ) in caplog.text
    members = np.concatenate([groups.members(i).example for i in range(groups.per_epoch)])
    assert sorted(members.tolist()) == sorted(set(range(20)) - {3, 4, 5})


def test_a_layout_that_fits_nothing_is_a_users_mistake():
    short = Layout(5, 3, 6, 1, 4, 4, 8, 6)
    with pytest.raises(UserError, match="10 longer than 6 tokens.*: set data.row_length to at least 1[0-9]$"):
        PackedGroups([Entry("a", 1, Words("a", 10))], Letters(), short, seed=0)
    no_slots = Layout(5, 3, 40, 1, 4, 0, 8, 6)
    with pytest.raises(UserError, match="draw_slots to 1 or more$"):
        PackedGroups([Entry("a", 1, Words("a", 10, ("draw",)))], Letters(), no_slots, seed=0)


def test_an_unreadable_picture_is_masked_and_counted():
    whole = PackedGroups([Entry("a", 1, Words("a", 40))], Letters(), LAYOUT, seed=0)
    holed = PackedGroups([Entry("a", 1, Words("a", 40, broken=(3, 6)))], Letters(), LAYOUT, seed=0)
    learned = valid = 0
    for i in range(whole.per_epoch):
        a, b = whole[i], holed[i]
        for name in ("tokens", "segment_ids", "positions", "source"):  # nothing moves
            np.testing.assert_array_equal(a[name], b[name])
        assert not (b["loss_mask"] & ~a["loss_mask"]).any()
        learned += int((a["loss_mask"] & ~b["loss_mask"]).sum())
        valid += sum(int(a[f"{role}_valid"].sum() - b[f"{role}_valid"].sum()) for role in ("read", "draw"))
    # Example 3 is an edit: its readable picture to read goes too. Example 6 draws. Neither learns any text.
    assert valid == 3 and learned == 0
    broken = [one for i in range(holed.per_epoch) for one in holed.make(i).broken]
    assert sorted(one.key for one in broken) == ["a/3", "a/6"]
    assert {one.reason for one in broken} == {"a picture cannot be decoded"} and "picture x" in broken[0].message
    assert sum(holed.make(i).examples for i in range(holed.per_epoch)) == 40


def test_lengths_are_stored_by_what_they_depend_on(tmp_path):
    class Counting(Words):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            if i == 9:
                raise BrokenExample("a/9", "not JSON", "line 3")
            return super().__getitem__(i)

    source = Counting("a", 500)
    first = scan_lengths(source, Letters(), LAYOUT, "a", tmp_path / "lengths")
    for i in range(0, 500, 7):
        laid_out = lay_out(source[i], Letters(), LAYOUT)
        roles = [placed.role for placed in laid_out.pictures]
        expected = len(laid_out.tokens), roles.count("read"), roles.count("draw")
        assert (first.tokens[i], first.reads[i], first.draws[i]) == expected
    assert first.tokens[9] == -1 and first.reasons == {"not JSON": 1}
    assert first.messages == ["example a/9: not JSON (line 3)"]
    source.reads = 0
    again = scan_lengths(source, Letters(), LAYOUT, "a", tmp_path / "lengths")
    assert source.reads < 50 and all((a == b).all() for a, b in zip(first[:3], again[:3], strict=True))
    assert again[3:] == first[3:]
    longer = scan_lengths(Counting("abc", 500), Letters(), LAYOUT, "a", tmp_path / "lengths")
    assert (longer.tokens == first.tokens + 2 * (first.tokens > 0)).all()
    paths = list((tmp_path / "lengths").iterdir())
    assert len(paths) == 2  # each by what it depends on
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    assert (scan_lengths(source, Letters(), LAYOUT, "a", tmp_path / "lengths").tokens == first.tokens).all()


@pytest.mark.parametrize("reason", sorted(TRANSIENT))
def test_a_failure_of_the_storage_is_not_kept(tmp_path, reason):
    class Away(Words):
        away = ()

        def __getitem__(self, i):
            if i in self.away:
                raise BrokenExample(f"a/{i}", reason)
            return super().__getitem__(i)

    source = Away("a", 60)
    whole = scan_lengths(source, Letters(), LAYOUT, "a").tokens
    source.away = (7, 59)  # one that the name of the file is made from, one that it is not
    holed = scan_lengths(source, Letters(), LAYOUT, "a", tmp_path)
    assert np.flatnonzero(holed.tokens != whole).tolist() == [7, 59] and holed.reasons == {reason: 2}
    source.away = ()
    assert (scan_lengths(source, Letters(), LAYOUT, "a", tmp_path).tokens == whole).all()
    # A file of before, in which such a failure stands, is read anew.
    (path,) = tmp_path.iterdir()
    write_arrays(path, {"reasons": {reason: 60}, "messages": []}, {
        "tokens": np.full(60, -1, np.int32), "reads": holed.reads, "draws": holed.draws
    })  # fmt: skip
    assert (scan_lengths(source, Letters(), LAYOUT, "a", tmp_path).tokens == whole).all()


def test_stored_arrays_are_shared_by_name(tmp_path):
    arrays = {"a": np.arange(1000), "b": np.zeros((0, 2), np.uint8), "c": np.ones((2, 3), np.float32)}
    write_arrays(tmp_path / "x", {"about": [1, "é"]}, arrays)
    about, stored = read_arrays(tmp_path / "x")
    assert about == {"about": [1, "é"]}
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array)
    assert len(pickle.dumps(stored["a"])) < 300  # the file's name
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stored["a"])), arrays["a"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stored["a"][5:])), arrays["a"][5:])
    with pytest.raises(ValueError, match="read-only"):
        stored["a"][0] = 1
    (tmp_path / "y").write_text("something else")
    (tmp_path / "w").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert [read_arrays(tmp_path / name) for name in "yzw"] == [None] * 3


def test_a_failure_to_write_arrays_leaves_what_was_there(tmp_path, monkeypatch):
    def full(arrays, path, metadata):
        raise SafetensorError("No space left on device")

    write_arrays(tmp_path / "x", {}, {"a": np.arange(3)})
    monkeypatch.setattr(arrays_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_arrays(tmp_path / "x", {}, {"a": np.arange(4)})
    assert len(read_arrays(tmp_path / "x")[1]["a"]) == 3 and len(list(tmp_path.iterdir())) == 1


def test_scanning_with_processes_is_the_same(tmp_path, monkeypatch):
    source = ShapesSource("caption", num_examples=300, size=8)
    one = scan_lengths(source, tiny.Letters(), LAYOUT)
    monkeypatch.setattr(lengths, "WORTH_PROCESSES", 100)
    many = scan_lengths(source, tiny.Letters(), LAYOUT, workers=2)
    for name in ("tokens", "reads", "draws"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))


def test_fill_counts_what_the_rows_hold():
    groups = PackedGroups([Entry("a", 1.0, Words("a", 137))], Letters(), LAYOUT, seed=2)
    whole = [groups[i] for i in range(groups.per_epoch)]
    fill = groups.fill()
    assert fill.tokens == pytest.approx(np.mean([group["segment_ids"] > 0 for group in whole]))
    assert fill.read_slots == pytest.approx(np.mean([group["read_valid"] for group in whole]))
    assert fill.draw_slots == pytest.approx(np.mean([group["draw_valid"] for group in whole]))


def test_every_example_comes_as_often_as_any_other_of_its_source():
    """Epochs that are no whole number of passes: over many of them nothing is lost or repeated too often."""
    groups = two_sources(examples_per_epoch=31)
    assert groups.counts == [23, 8]
    seen = [np.zeros((40, 60), int), np.zeros((40, 37), int)]
    for epoch in range(40):
        for g in range(groups.per_epoch):
            members = groups.members(epoch * groups.per_epoch + g)
            for s, i in zip(members.source, members.example, strict=True):
                seen[s][epoch, i] += 1
    for counts, n, share in zip(seen, (60, 37), (23, 8), strict=True):
        per_epoch = counts.sum(axis=1)
        assert abs(per_epoch.mean() - share) < 0.2 and abs(per_epoch - share).max() <= 8
        times = counts.cumsum(axis=0)
        for epoch in range(40):  # at no time is one example two passes ahead of another of its source
            assert times[epoch].max() - times[epoch].min() <= 2
        assert abs(times[-1] - 40 * share / n).max() <= 2


def test_a_far_epoch_is_as_near_as_the_first():
    groups = two_sources()
    far = 10**6 * groups.per_epoch
    seen = collections.Counter()
    for i in range(far, far + groups.per_epoch):
        members = groups.members(i)
        seen.update(zip(members.source.tolist(), members.example.tolist(), strict=True))
    assert max(seen.values()) <= 2 and abs(sum(seen.values()) - sum(groups.counts)) <= 12


def test_a_large_epoch_repeats_its_template(monkeypatch):
    """The same promises where the places of an epoch are more than are packed one by one."""
    monkeypatch.setattr(epochs, "TEMPLATE", 2000)
    rng = np.random.default_rng(1)
    n = 8000
    known = [
        Lengths(rng.integers(4, 30, n).astype(np.int32), rng.integers(0, 2, n), rng.integers(0, 2, n), {}, ())
        for _ in range(2)
    ]
    layout = Layout(1, 1, 64, 4, 16, 16, 1, 1)
    packed = epochs.Epochs(known, [n, n], ["a", "b"], layout, 0)
    for epoch in (0, 3):
        seen = np.zeros((2, n), int)
        tokens = 0
        for g in range(packed.per_epoch):
            members = packed.members(epoch, g)
            np.add.at(seen, (members.source, members.example), 1)
            used = np.zeros((4, 64), int)
            for s, i, row, start, length in zip(*members, strict=True):
                assert length == known[s].tokens[i]
                used[row, start : start + length] += 1
            assert used.max() <= 1
            for name, slots in ("reads", 16), ("draws", 16):
                held = [getattr(known[s], name)[i] for s, i in zip(members.source, members.example, strict=True)]
                assert sum(held) <= slots
            tokens += used.sum()
        assert (seen == 1).all()
        # A template this small costs some 5 %: 208 classes are rounded up to 8 repeats, by 4 places on average.
        assert tokens / (packed.per_epoch * 4 * 64) > 0.9
    orders = [packed.members(epoch, 0).example.tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_shuffling_is_even_in_small_classes():
    """Every permutation of four is as likely as any other: chi-squared over 24 of them."""
    counts = collections.Counter(tuple(shuffled(np.arange(4), 4, "key", k).tolist()) for k in range(4800))
    chi = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert len(counts) == 24 and chi < 49.7  # 99.9 % of a chi-squared of 23 degrees of freedom


def test_the_caption_is_dropped_at_its_rate_and_nothing_moves():
    class Dropping(Words):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            text, picture = example.parts
            return dataclasses.replace(example, drop=0.25, dropped=(Text("d"), picture))

    plain_groups = PackedGroups([Entry("a", 1, Words("a", 60, ("draw",)))], Letters(), LAYOUT, seed=0)
    groups = PackedGroups([Entry("a", 1, Dropping("a", 60, ("draw",)))], Letters(), LAYOUT, seed=0)
    assert groups.per_epoch == plain_groups.per_epoch
    dropped = collections.Counter()
    for epoch in range(8):
        for i in range(epoch * groups.per_epoch, (epoch + 1) * groups.per_epoch):
            group, whole = groups[i], plain_groups[i]
            np.testing.assert_array_equal(group["draw_images"], whole["draw_images"])
            np.testing.assert_array_equal(group["draw_id"], whole["draw_id"])
            starts = [s[-1] for s in segments(whole)]
            for (_, tokens, _, _, start), (_, full, _, _, _) in zip(segments(group), segments(whole), strict=True):
                assert start == starts.pop(0)
                if tokens.tolist() != full.tolist():
                    assert Letters().decode(tokens) == "d" and len(tokens) <= len(full)
                    dropped[Letters().decode(full)] += 1
    # 480 draws at 0.25: 120 +- 4 standard deviations of 9.5; not the same ones in every epoch.
    assert 82 < sum(dropped.values()) < 158 and len(dropped) > 45 and max(dropped.values()) < 8


def test_an_example_that_is_longer_without_its_caption_is_masked_in_its_place():
    class Growing(Words):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            longer = (Text("d" * 25), example.parts[1])
            return dataclasses.replace(example, drop=1.0, dropped=longer) if i == 3 else example

    whole = PackedGroups([Entry("a", 1, Words("a", 20, ("draw",)))], Letters(), LAYOUT, seed=0)
    groups = PackedGroups([Entry("a", 1, Growing("a", 20, ("draw",)))], Letters(), LAYOUT, seed=0)
    messages = []
    for i in range(groups.per_epoch):
        made, expected = groups.make(i), whole[i]
        messages += [one.message for one in made.broken]
        for name in ("segment_ids", "positions", "source"):  # nothing moves
            np.testing.assert_array_equal(made.item[name], expected[name])
        assert expected["draw_valid"].sum() - made.item["draw_valid"].sum() == len(made.broken)
    assert messages == ["a/3 is longer without its caption than with it"]


def test_a_long_text_is_cut_only_where_the_example_allows():
    t = Letters()
    parts = (Text("Q" * 30), Text("A" * 30, learn=True))
    assert len(lay_out(Example(parts, "k"), t, LAYOUT).tokens) == 62
    cut = lay_out(Example(parts, "k", cut=True), t, LAYOUT)
    assert len(cut.tokens) == 40 and cut.tokens[-1] == t.eos
    assert (
        cut.loss_mask[31:39].all() and not cut.loss_mask[39] and cut.loss_mask.sum() == 8
    )  # it does not learn to stop there
    picture = Picture(plain(0, 6), "draw")
    drawn = lay_out(Example((Text("Q" * 60), picture), "k", cut=True), t, LAYOUT)
    assert len(drawn.tokens) == 40 and (drawn.tokens == t.image).sum() == 3
    hopeless = Example((Text("Q" * 60), Text("A", learn=True)), "k", cut=True)
    assert len(lay_out(hopeless, t, LAYOUT).tokens) == 63


def test_every_turn_of_a_conversation_ends():
    t = Letters()
    turns = (Text("Q"), Text("A", learn=True), Text("R"), Text("B", learn=True))
    got = lay_out(Example(turns, "k"), t, LAYOUT)
    assert got.tokens.tolist() == [t.bos, ord("Q"), ord("A"), t.eos, ord("R"), ord("B"), t.eos]
    assert got.loss_mask.astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1]


def test_turns_begin_where_the_parts_say_so():
    """Two turns of one speaker stay two; a picture inside the model's turn is no end of it."""
    t = Letters()
    turns = (Text("Q", turn="user"), Text("A", learn=True, turn="assistant"), Text("B", learn=True, turn="assistant"))
    got = lay_out(Example(turns, "k"), t, LAYOUT)
    assert got.tokens.tolist() == [t.bos, ord("Q"), ord("A"), t.eos, ord("B"), t.eos]
    assert got.loss_mask.astype(int).tolist() == [0, 0, 1, 1, 1, 1]
    picture = Picture(plain(0, 6), "read")
    within = (Text("Q", turn="user"), Text("A", learn=True, turn="assistant"), picture, Text("B", learn=True))
    got = lay_out(Example(within, "k"), t, LAYOUT)
    seen = [t.image] * LAYOUT.read_vectors
    assert got.tokens.tolist() == [t.bos, ord("Q"), ord("A"), *seen, ord("B"), t.eos]
    assert got.loss_mask.astype(int).tolist() == [0, 0, 1, *[0] * len(seen), 1, 1]
