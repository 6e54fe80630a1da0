"""Sources and pictures: real data where it is there, and generated folders of everything that comes in."""

import concurrent.futures
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tiny
from PIL import Image, ImageOps

from pisces_jax.data import sources, storage
from pisces_jax.data.example import BrokenExample, Example, Picture, Text
from pisces_jax.data.formats import parquet, record_files, webdataset
from pisces_jax.data.images import UnreadablePicture, fit, load_image
from pisces_jax.data.packing import lengths
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.recipes import Recipe, Record
from pisces_jax.data.sources import make_source
from pisces_jax.utils.errors import UserError

DATA = Path(os.environ.get("PISCES_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {DATA / name}: set PISCES_DATA to a folder that holds {name}")
    return DATA / name


def texts(example):
    return [(part.text, part.learn) for part in example.parts if isinstance(part, Text)]


def picture(example):
    (part,) = [part for part in example.parts if isinstance(part, Picture)]
    return part


def png(mode, colour, size=(4, 4), **options):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    with open(tmp_path / "metadata.jsonl", "w") as metadata:
        for i in range(200):
            (tmp_path / f"{i}.png").write_bytes(png("RGB", (i, 0, 0)))
            line = {"file_name": f"{i}.png", "text": f"number {i}", "tags": f"red, {i}"}
            metadata.write(json.dumps(line) + "\n\n" * (i % 2))
            metadata.write("" if i % 2 else "\n")
    return tmp_path


def source_of(kind, **spec):
    return make_source(dict(kind=kind, **spec)).source


def image_folder(path, split="all", recipe="pair", **spec):
    return source_of("image_folder", path=str(path), split=split, recipe=recipe, **spec)


def test_recipes(folder):
    def make(recipe):
        example = image_folder(folder, "all", recipe, detailed_format="{text}: {tags}")[7]
        order = [part.role if isinstance(part, Picture) else "text" for part in example.parts]
        assert (picture(example).array() == [7, 0, 0]).all() and example.key.endswith("/7.png")
        return order, texts(example)

    assert make("caption") == (["read", "text", "text"], [("caption:", False), ("number 7", True)])
    assert make("describe") == (["read", "text", "text"], [("describe:", False), ("number 7: red, 7", True)])
    assert make("draw_caption") == (["text", "draw"], [("draw: number 7", False)])
    assert make("draw_details") == (["text", "draw"], [("draw: number 7: red, 7", False)])
    expected = [("draw: number 7", False), ("number 7: red, 7", True)]
    assert make("draw_described") == (["text", "text", "draw"], expected)
    assert make("pair") == (["read", "text"], [("number 7", False)])


def test_folder_splits_are_disjoint_whole_and_stable(folder):
    def keys_of(split):
        source = image_folder(folder, split)
        return [source[i].key for i in range(len(source))]

    keys = {split: keys_of(split) for split in ("train", "val", "all")}
    assert sorted(keys["train"] + keys["val"]) == sorted(keys["all"]) and len(set(keys["all"])) == 200
    assert 5 <= len(keys["val"]) <= 40
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[::-2]))
    assert set(keys_of("val")) <= set(keys["val"])  # whatever else is in the folder


def test_folder_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="set path"):
        image_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="train, val or all"):
        image_folder(folder, "test")
    with pytest.raises(UserError, match="choose one of caption"):
        image_folder(folder, recipe="draw")
    with pytest.raises(UserError, match="detailed_format"):
        image_folder(folder, recipe="describe")
    with pytest.raises(UserError, match="'label', but the fields are file_name, tags, text"):
        image_folder(folder, caption_format="{label}")
    for line, message in (
        ('{"file_name": "0.png", "te', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": "x"}', "a field is missing"),
        ('{"file_name": "../a.png", "text": "x"}', "a name outside its folder"),
        ('{"file_name": "/a.png", "text": "x"}', "a name outside its folder"),
        ('{"file_name": "0.png", "text": ""}', "an empty text"),
        ('{"file_name": "0.png", "text": "half \\ud83d"}', "not UTF-8"),
        ('{"file_name": "\\ud83d.png", "text": "a"}', "not UTF-8"),
    ):
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line)
        source = image_folder(folder)
        assert source[0].key.endswith("/0.png") and len(source) == 2  # the others are used
        with pytest.raises(BrokenExample, match=message) as error:
            source[1]
        assert error.value.reason == message and error.value.key
        assert pickle.loads(pickle.dumps(error.value)).reason == message
    for text in ("", "\n \n", '{"file_name": "0.png", "te'):
        (folder / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match="JSON object"):
            image_folder(folder)


def test_openmoji():
    source = image_folder(real("openmoji64"), "all", "describe", detailed_format="{text}, {group}: {tags}")
    assert len(source) == 1653
    assert texts(source[0])[1][0].startswith("grinning face, smileys-emotion: cheerful, cheery")
    assert picture(source[0]).role == "read" and picture(source[0]).array().shape == (64, 64, 3)
    assert (picture(source[0]).array()[0, 0] == 255).all()  # on white


def test_cifar10():
    spec = dict(kind="tfds", dataset="cifar10", data_dir=real("tfds"), recipe="draw_caption")
    spec["caption_format"] = "a photo of a {label}"
    entry = make_source({**spec, "split": "test"})
    source = pickle.loads(pickle.dumps(entry.source))  # as a data worker gets it
    assert entry.name == "tfds" and entry.weight == 1 and len(source) == 4000
    names = (DATA / "tfds/cifar10/3.0.2/label.labels.txt").read_text().split()
    seen = {texts(source[i])[0][0] for i in range(300)}
    assert seen == {f"draw: a photo of a {name}" for name in names}
    array = picture(source[0]).array()
    assert array.shape == (32, 32, 3) and array.dtype == np.uint8 and array.std() > 5
    assert len(make_source({**spec, "dataset": "cifar10/3.0.2", "split": "train[:10%]"}).source) == 2000
    with pytest.raises(UserError, match="its splits are train, test"):
        make_source({**spec, "split": "validation"})
    with pytest.raises(UserError, match="the fields are id, label"):
        make_source({**spec, "split": "test", "caption_format": "{name}"})
    with pytest.raises(UserError, match="set images"):
        make_source({**spec, "split": "test", "images": ("picture",)})
    # The same files as plain ArrayRecord: labels are numbers there.
    plain = source_of(
        "array_record", path=f"{DATA}/tfds/cifar10/3.0.2/*test*", recipe="draw_caption", caption_format="{label}"
    )
    again = pickle.loads(pickle.dumps(plain))
    assert len(again) == 4000
    for i in (0, 17, 3999):
        assert (picture(again[i]).array() == picture(source[i]).array()).all()
        assert f"draw: a photo of a {names[int(texts(again[i])[0][0].split()[1])]}" == texts(source[i])[0][0]


def test_what_is_read_is_seen_otherwise_in_every_epoch():
    whole = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    parts = (Picture(lambda: whole, "read"), Text("a"), Picture(whole, "draw"))
    example = Example(parts, "key", flip=True, crop=0.5)
    seen = [example.of_epoch(0, epoch) for epoch in range(200)]
    assert all(one.parts[1:] == parts[1:] for one in seen)  # drawn pictures stay as they are
    windows = {whole[y : y + h, x : x + w][:, ::way].tobytes() for h in range(3, 7) for w in range(4, 9)
               for y in range(7 - h) for x in range(9 - w) for way in (1, -1)}  # fmt: skip
    found = [one.parts[0].array() for one in seen]
    assert all(image.tobytes() in windows for image in found)
    assert {image.shape[0] for image in found} == {3, 4, 5, 6}
    again = example.of_epoch(0, 7).parts[0].array()
    assert again.tobytes() == found[7].tobytes() and len({image.tobytes() for image in found}) > 50
    mirrored = [Example(parts, f"{i}", flip=True).of_epoch(0, 0).parts[0].array() for i in range(100)]
    assert 30 < sum((image == whole[:, ::-1]).all() for image in mirrored) < 70
    assert seen[0].parts[0].square(4).shape == (4, 4, 3)
    plain = Example(parts, "key")
    assert plain.of_epoch(0, 3) is plain and not plain.varies and example.varies
    # What lengths are known by does not change.
    assert repr(Recipe("caption", flip=True, crop=0.1)) == repr(Recipe("caption"))


def test_a_missing_dataset_is_named_without_asking_the_network(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset cifar10 in"):
        source_of("tfds", dataset="cifar10", split="train", data_dir=str(tmp_path), recipe="pair")
    with pytest.raises(UserError, match="mount the bucket"):
        source_of("tfds", dataset="cifar10", split="train", data_dir="gs://b/tfds", recipe="pair")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(caption_format="{text"), "'{text' is not a format (expected '}' before end of string): fix its braces"),
        (dict(caption_format=("{text}", "}")), "'}' is not a format"),
        (dict(caption_format=()), "caption_format=() is not a format"),
        (dict(caption_format=3), "caption_format=3 is not a format"),
        (dict(caption_format=("{text}", 3)), "is not a format: give one"),
        (dict(caption_format=None), "caption_format=None is not a format"),
        (dict(caption_format="a {} b"), "braces without a field's name"),
        (dict(caption_format="{0}"), "braces without a field's name"),
        (dict(answer_format="{[1]}"), "answer_format='{[1]}' has braces without"),
        (dict(drop="0.1"), "drop='0.1' is not a rate"),
        (dict(drop=None), "drop=None is not a rate"),
        (dict(crop="x"), "crop='x' is not a share"),
        (dict(crop=1), "crop=1 is not a share"),
        (dict(flip="no"), "flip='no' is neither True nor False"),
        (dict(val_share="x"), "val_share='x' is not a share"),
        (dict(weight="x"), "weight='x' is not a number"),
        (dict(recipe=["caption"]), "unknown recipe ['caption']"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(folder, change, words):
    spec = dict(path=str(folder / "metadata.jsonl"), recipe="draw_caption") | change
    for kind, where in ("json", spec), ("image_folder", {**spec, "path": str(folder)}):
        with pytest.raises(UserError) as error:
            source_of(kind, **where)
        assert str(error.value).startswith(f"source {kind}: ") and words in str(error.value)


def test_one_picture_can_be_named_by_a_word(pictures):
    path = jsonl(pictures / "a.jsonl", {"before": "red.png", "after": "blue.png", "text": "a"})
    assert shape_of(source_of("json", path=path, recipe="pair", images="before")[0])[0] == RED
    path = shard(pictures / "a.tar", [("1.left.jpg", b""), ("1.right.png", png("RGB", (0, 0, 255))), ("1.txt", b"a")])
    assert shape_of(source_of("webdataset", path=path, recipe="pair", images="right.png")[0])[0] == BLUE


def test_make_source_names_mistakes(folder):
    with pytest.raises(UserError, match="choose one of shapes, image_folder, tfds"):
        make_source({"kind": "webdatasets"})
    with pytest.raises(UserError, match="takes no 'folder'"):
        make_source({"kind": "image_folder", "folder": "x"})
    with pytest.raises(UserError, match="did you mean 'caption_format'"):
        make_source({"kind": "json", "caption_fomat": "x"})
    with pytest.raises(UserError, match="needs 'recipe'"):
        make_source({"kind": "image_folder", "path": str(folder), "split": "all"})
    with pytest.raises(UserError, match="source n: drop=0.1 is for drawing"):
        make_source(dict(kind="image_folder", name="n", path=str(folder), recipe="caption", drop=0.1))
    entry = make_source(dict(kind="image_folder", name="n", weight=2, path=str(folder), split="all", recipe="pair"))
    assert entry[:2] == ("n", 2.0) and len(entry.source) == 200


def array_record(path, *records):
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def tf_example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, values in features.items():
        example.features.feature[name].bytes_list.value.extend(values)
    return example.SerializeToString()


def prepared_by_tfds(folder, *texts):
    """A dataset of a picture, a text and a sequence of texts, as TensorFlow Datasets writes it."""
    records = [tf_example(image=[png("RGB", (9, 0, 0))], text=[text], words=[b"first", text]) for text in texts]
    array_record(folder / "set-train.array_record-00000-of-00001", *records)
    module = "tensorflow_datasets.core.features."
    text = {"pythonClassName": f"{module}text_feature.Text", "text": {}}
    image = {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["-1", "-1", "3"]}}
    many = {"feature": text, "length": "-1"}
    features = {
        "image": {"pythonClassName": f"{module}image_feature.Image", "image": image},
        "text": text,
        "words": {"pythonClassName": f"{module}sequence_feature.Sequence", "sequence": many},
    }
    whole = {"pythonClassName": f"{module}features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(whole))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "filepathTemplate": template, "numBytes": "1", "shardLengths": [str(len(texts))]}
    about = {"name": "set", "version": folder.name, "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(about))


def test_bytes_that_are_no_text(tmp_path):
    """They break an example whose text they are, and no other: a field may be a mask."""
    prepared_by_tfds(tmp_path / "set/1.0.0", b"good", b"\xff")
    path = array_record(
        tmp_path / "plain", *(tf_example(image=[png("RGB", (9, 0, 0))], text=[t], words=[b"first", t], mask=[b"\xfe"])
        for t in (b"good", b"\xff"))
    )  # fmt: skip
    for spec in (
        dict(kind="tfds", dataset="set", split="train", data_dir=str(tmp_path)), dict(kind="array_record", path=path)
    ):  # fmt: skip
        for text_format, said, broken in (
            ("{text}", "good", True), ("{words[1]}", "good", True), ("{words[0]}", "first", False)
        ):  # fmt: skip
            source = make_source(dict(spec, recipe="pair", caption_format=text_format)).source
            assert shape_of(source[0]) == [("read", [9, 0, 0]), (said, False)]
            assert problems(source) == ({1: "not UTF-8"} if broken else {})


def test_of_several_configurations_one_must_be_named(tmp_path):
    for name in "2014/1.0.0", "2014/1.1.0", "2017/1.1.0":
        prepared_by_tfds(tmp_path / "set" / name, name.encode())
    spec = dict(kind="tfds", split="train", data_dir=str(tmp_path), recipe="pair")
    with pytest.raises(UserError, match="set dataset to one of set/2014/1.0.0, set/2014/1.1.0, set/2017/1.1.0"):
        make_source({**spec, "dataset": "set"})
    for name, said in ("set/2014", "2014/1.1.0"), ("set/2014/1.0.0", "2014/1.0.0"), ("set/2017", "2017/1.1.0"):
        assert texts(make_source({**spec, "dataset": name}).source[0]) == [(said, False)]


# Recipes


def test_wordings_belong_to_the_example(folder):
    wordings = ("a {text}", "b {text}", "c {text}")
    source = image_folder(folder, recipe="draw_caption", caption_format=wordings, drop=0.1)
    first = [texts(source[i])[0][0] for i in range(200)]
    assert first == [texts(source[i])[0][0] for i in range(200)]
    counts = [sum(text.startswith(f"draw: {letter} number") for text in first) for letter in "abc"]
    assert sum(counts) == 200 and min(counts) > 40
    example = source[3]
    assert example.drop == 0.1 and [part.text for part in example.dropped[:1]] == ["draw: "]
    times = sum(example.of_epoch(0, epoch).parts == example.dropped for epoch in range(2000))
    assert 150 < times < 250  # 200, standard deviation 13
    with pytest.raises(UserError, match="'tag'"):
        image_folder(folder, caption_format=("{text}", "{tag}"))
    with pytest.raises(UserError, match="drop=1.5"):
        Recipe("draw_caption", drop=1.5)


def jsonl(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        (tmp_path / f"{name}.png").write_bytes(png("RGB", colour))
    return tmp_path


def shape_of(example):
    """Parts in short: ("read", colour), (text, learn)."""
    return [
        (part.text, part.learn) if isinstance(part, Text) else (part.role, part.array()[0, 0].tolist())
        for part in example.parts
    ]


RED, GREEN, BLUE = ("read", [255, 0, 0]), ("read", [0, 255, 0]), ("read", [0, 0, 255])
LLAVA = {
    "id": "1",
    "image": "red.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
LLAVA_PARTS = [RED, ("What is it?", False), ("Red.", True), ("Sure?", False), ("Yes.", True)]
SHAREGPT = {
    "images": ["red.png", "green.png"],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "<image>And this?"},
        {"role": "assistant", "content": "Green."},
    ],
}
SHAREGPT_PARTS = [
    ("Be short.", False), RED, ("First?", False), ("Red.", True), GREEN, ("And this?", False), ("Green.", True),
]  # fmt: skip


@pytest.mark.parametrize("form", ["array", "lines"])
def test_conversations(pictures, form):
    path = pictures / "talk.json"
    text_only = {"texts": [{"user": "Sure?", "assistant": "Yes.", "source": "x"}]}
    if form == "array":
        path.write_text(json.dumps([LLAVA, SHAREGPT, text_only], indent=1))
    else:
        jsonl(path, LLAVA, SHAREGPT, text_only)
    source = pickle.loads(pickle.dumps(source_of("json", path=str(path), recipe="conversation")))
    assert [shape_of(source[i]) for i in range(len(source))] == [LLAVA_PARTS, SHAREGPT_PARTS, LLAVA_PARTS[3:]]
    assert len({source[i].key for i in range(3)}) == 3
    # Each turn begins where the file has it; a picture inside a turn is no turn of its own.
    assert [part.turn for part in source[0].parts] == ["user", None, "assistant", "user", "assistant"]
    assert [part.turn for part in source[1].parts] == ["user", "user", None, "assistant", "user", None, "assistant"]


def test_pictures_without_marks_stand_in_the_first_turn(pictures):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
    path = jsonl(
        pictures / "talk.json", dict(image="red.png", messages=turns), dict(image="red.png", messages=turns[1:])
    )
    source = source_of("json", path=path, recipe="conversation")
    assert [part.turn for part in source[0].parts] == [None, None, "assistant"]
    assert [part.turn for part in source[1].parts] == [None, "assistant"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(conversations=[{"from": "human", "value": "<image><image>?"}]), "marks and pictures differ"),
        (dict(conversations=[]), "no conversation"),
        (dict(conversations=[{"from": "tool", "value": "x"}]), "a turn of an unknown form"),
        (dict(conversations=["x"]), "a turn of an unknown form"),
        (dict(conversations=[LLAVA["conversations"][0], {"from": "gpt", "value": None}]), "a turn of an unknown form"),
        (dict(conversations=LLAVA["conversations"][:1]), "the model says nothing"),
        (dict(image="../red.png"), "a name outside its folder"),
        (dict(image="\ud800.png"), "not UTF-8"),
        (dict(conversations=[{"from": "human", "value": "?"}, {"from": "gpt", "value": "\ud83d"}]), "not UTF-8"),
        (dict(image=3), "a name outside its folder"),
    ],
)
def test_broken_conversations_are_told_apart(pictures, change, reason):
    path = jsonl(pictures / "talk.jsonl", LLAVA, {**LLAVA, **change})
    source = source_of("json", path=path, recipe="conversation")
    assert shape_of(source[0]) == LLAVA_PARTS
    with pytest.raises(BrokenExample) as error:
        source[1]
    assert error.value.reason == reason and error.value.key == "json/talk.jsonl/2"


def test_questions_and_edits(pictures):
    path = jsonl(pictures / "vqa.jsonl", {"image": "red.png", "question": "Which?", "answer": "red", "answers": ["r"]})
    parts = [RED, ("Q: Which?", False), ("r", True)]
    source = source_of(
        "json", path=path, recipe="question", question_format="Q: {question}", answer_format="{answers[0]}"
    )
    assert shape_of(source[0]) == parts
    path = jsonl(pictures / "edits.jsonl", {"before": "red.png", "after": "blue.png", "text": "make it blue"})
    source = source_of("json", path=path, recipe="edit", images=("before", "after"), drop=0.2)
    assert shape_of(source[0]) == [RED, ("draw: make it blue", False), ("draw", [0, 0, 255])]
    example = source[0]
    assert example.dropped[0] is example.parts[0] and example.dropped[2] is example.parts[2]
    assert example.dropped[1] == Text("draw: ") and example.drop == 0.2
    with pytest.raises(BrokenExample, match="a picture is missing"):
        source_of("json", path=path, recipe="edit", images=("before",))[0]


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_a_caption_that_is_missing_is_no_word(pictures, nothing):
    """Python's formats would say "None" or "[]"."""
    whole = {"image": "red.png", "text": "a", "answers": ["r"], "number": 0}
    path = jsonl(pictures / "a.jsonl", whole, {**whole, "text": nothing}, {**whole, "answers": [nothing]})
    for text_format, said, broken in (
        ("{text}", "a", 1), ("the {text!s:>3}", "the   a", 1), ("{answers[0]}", "r", 2), ("{number}", "0", None)
    ):  # fmt: skip
        source = source_of("json", path=path, recipe="pair", caption_format=text_format)
        assert texts(source[0]) == [(said, False)]
        assert problems(source) == ({broken: "a field is missing"} if broken else {})
    recipe = Recipe("caption", "{a}")  # what TensorFlow Datasets gives
    assert recipe.text(Record("key", {"a": np.int64(0)}, [])) == "0"
    with pytest.raises(BrokenExample, match="a field is missing"):
        recipe.text(Record("key", {"a": np.array([], object)}, []))


def test_json_that_breaks_off(pictures):
    """What can be read is used; the rest is counted."""
    whole = json.dumps([LLAVA, LLAVA, LLAVA])
    path = pictures / "cut.json"
    path.write_text(whole[: len(whole) * 5 // 6])
    source = source_of("json", path=str(path), recipe="conversation")
    assert len(source) == 3 and shape_of(source[1]) == LLAVA_PARTS
    with pytest.raises(BrokenExample, match="not JSON"):
        source[2]
    path = pictures / "cut.jsonl"
    lines = [json.dumps(LLAVA).encode(), b'{"image": "red.png", "text": "\xff\xfe"}', json.dumps(LLAVA).encode()[:50]]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(lines))
    source = source_of("json", path=str(path), recipe="conversation")
    assert len(source) == 3 and shape_of(source[0]) == LLAVA_PARTS
    for i, reason in (1, "not UTF-8"), (2, "not JSON"):
        with pytest.raises(BrokenExample) as error:
            source[i]
        assert error.value.reason == reason
    for text in ("", "[]", "nonsense", '{"half": '):
        path.write_text(text)
        source = None
        try:
            source = source_of("json", path=str(path), recipe="conversation")
        except UserError as error:
            assert "no JSON object" in str(error)
        else:
            assert text in ("nonsense", '{"half": ') and len(source) == 1
    with pytest.raises(UserError, match="cannot be read"):
        source_of("json", path=str(pictures / "none.json"), recipe="conversation")


def test_blank_lines_of_any_length(pictures):
    line = json.dumps(LLAVA).encode()
    path = pictures / "a.jsonl"
    path.write_bytes(b"\n".join([line, b"     ", b"", b"  " + line, b"\t\t\t\t\t\r", line, b" " * 100]))
    source = source_of("json", path=str(path), recipe="conversation")
    assert [shape_of(source[i]) for i in range(len(source))] == [LLAVA_PARTS] * 3


def test_an_object_around_the_array_is_named(pictures):
    path = pictures / "a.json"
    for text in (json.dumps({"info": {}, "annotations": [LLAVA]}, indent=1), '{"info": {},\n"annotations": []}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="is one object with the fields info, annotations: write only its array"):
            source_of("json", path=str(path), recipe="conversation")
    path.write_text('{"half": \n' + json.dumps(LLAVA))  # a line that is cut is no such thing
    source = source_of("json", path=str(path), recipe="conversation")
    assert problems(source) == {0: "not JSON"} and shape_of(source[1]) == LLAVA_PARTS


# WebDataset


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def jpeg(colour, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def sample(number, text=None, **more):
    text = text if text is not None else f"number {number}".encode()
    return [(f"{number:05d}.jpg", jpeg((number, 0, 0))), (f"{number:05d}.txt", text), *more.items()]


def problems(source):
    """What each record that cannot be used is counted by."""
    found = {}
    for i in range(len(source)):
        try:
            for part in source[i].parts:
                if isinstance(part, Picture):
                    part.array()
        except UserError as error:
            found[i] = error.reason
    return found


def test_webdataset(tmp_path):
    for s in range(3):
        members = [m for i in range(4) for m in sample(4 * s + i)]
        members += [(f"j{s}.json", json.dumps({"caption": f"from {s}", "width": 8}).encode()), (f"j{s}.webp", webp())]
        shard(tmp_path / f"s{s:03d}.tar", members)
    spec = dict(kind="webdataset", path=f"{tmp_path}/s{{000..002}}.tar", recipe="draw_caption")
    source = make_source(spec).source
    assert len(source) == 15 and {p.name for p in tmp_path.iterdir()} == {
        name for s in range(3) for name in (f"s{s:03d}.tar", f"s{s:03d}.tar.index")
    }
    source = pickle.loads(pickle.dumps(source))
    for i in (0, 6, 13):
        number = i - i // 5
        assert source[i].parts[0].text == f"draw: number {number}"
        assert source[i].key == f"webdataset/s00{i // 5}.tar/{number:05d}"
        assert abs(int(source[i].parts[1].array()[0, 0, 0]) - number) <= 2
    with pytest.raises(BrokenExample, match="a field is missing"):
        source[4]
    captions = make_source({**spec, "caption_format": "{caption} {width}"}).source
    assert captions[14].parts[0].text == "draw: from 2 8" and captions[14].parts[1].array().shape == (8, 8, 3)
    # A part of the shards, by pattern; held out, every fifth.
    assert len(make_source({**spec, "path": f"{tmp_path}/s*[01].tar"}).source) == 10
    train, val = (make_source({**spec, "split": split, "val_share": 0.2}).source for split in ("train", "val"))
    last = [f"webdataset/s00{s}.tar/j{s}" for s in range(3)]
    assert [val.records.read(i).key for i in (4, 9, 14)] == last
    assert (
        len(train) == 12
        and len(val) == 3
        and problems(val) == {0: "a field is missing"} | {1: "a field is missing", 2: "a field is missing"}
    )
    assert {train[i].key for i in range(12)}.isdisjoint(last)


def webp():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "WEBP")
    return file.getvalue()


def test_a_shard_that_changed_is_indexed_again(tmp_path):
    path = shard(tmp_path / "a.tar", sample(1) + sample(2))
    spec = dict(kind="webdataset", path=path, recipe="caption")
    old = make_source(spec).source
    made = webdataset.index_shard
    webdataset.index_shard = lambda path: pytest.fail("indexed twice")
    try:
        make_source(spec)
    finally:
        webdataset.index_shard = made
    shard(tmp_path / "b.tar", sample(7) + sample(8) + sample(9))
    os.replace(tmp_path / "b.tar", path)
    # A source that was open is not lied to: neither text nor picture is from the wrong place.
    assert set(problems(old).values()) == {"the shard changed since it was indexed"}
    new = make_source(spec).source
    assert [texts(new[i])[1][0] for i in range(3)] == ["number 7", "number 8", "number 9"]
    Path(f"{path}.index").write_bytes(b"pisces-arrays-1\nnonsense")
    webdataset._load_index.cache_clear()
    assert len(make_source(spec).source) == 3
    os.remove(path)
    assert set(problems(new).values()) == {"the shard is gone or cannot be read"}
    assert len(make_source(spec).source) == 3  # its index is there still, so nothing moves on resuming
    os.remove(f"{path}.index")
    webdataset._load_index.cache_clear()
    with pytest.raises(UserError, match=r"a\.tar cannot be read"):
        make_source(spec)


def test_broken_shards(tmp_path):
    good = sample(1)
    spec = dict(kind="webdataset", recipe="caption")

    def open_shard(members, cut=None):
        path = shard(tmp_path / f"{len(list(tmp_path.iterdir()))}.tar", members)
        if cut is not None:
            with open(path, "r+b") as file:
                file.truncate(cut)
        return make_source({**spec, "path": path}).source

    picture = jpeg((1, 2, 3), (64, 64))
    cases = {
        "a picture cannot be decoded": [("x.jpg", picture[: len(picture) // 2]), ("x.txt", b"x")],
        "a picture is missing": [("x.txt", b"x")],
        "a field is missing": [("x.jpg", picture), ("x.json", b'{"text": null}')],
        "not UTF-8": [("x.jpg", picture), ("x.txt", b"\xff\xfe\xfa")],
        "not JSON": [("x.jpg", picture), ("x.json", b'{"text": "x')],
        "not a JSON object": [("x.jpg", picture), ("x.json", b"[1]")],
        "an empty text": [("x.jpg", picture), ("x.txt", b" ")],
        "a name outside its folder": [("../x.jpg", picture), ("../x.txt", b"x")],
        "duplicate key": [*good[:0], ("00001.jpg", picture), ("00001.txt", b"x")],
    }
    for reason, members in cases.items():
        between = sample(2) if reason == "duplicate key" else []
        source = open_shard(good + between + members + sample(3))
        bad = len(between) // 2 + 1
        assert problems(source) == {bad: reason}, reason
        assert shape_of(source[0])[1:] == [("caption:", False), ("number 1", True)]
    assert problems(open_shard([("x.jpg", b""), ("x.txt", b"x"), *good])) == {0: "a picture cannot be decoded"}
    assert problems(open_shard([("x.jpg", b"hello"), ("x.txt", b"x"), *good])) == {0: "a picture cannot be decoded"}
    assert problems(open_shard([("x.jpg", picture), ("x.jpg", picture), ("x.txt", b"x")])) == {
        0: "a field is missing",
        1: "duplicate key",
    }
    # Cut in a member's bytes, and in a header.
    members = sample(1) + [("00002.txt", b"two"), ("00002.jpg", bytes(5000))]
    whole = (tmp_path / "whole.tar", members)
    shard(*whole)
    end = os.path.getsize(whole[0])
    assert end > 6000
    headers = [m.offset for m in tarfile.open(whole[0])]
    assert problems(open_shard(members, headers[3] + 1024)) == {1: "the shard is cut off"}
    for data, message in (
        (b"", "hold no sample"), (b"no tar" * 1000, "not a tar file"), (gzip.compress(bytes(9999)), "is compressed")
    ):  # fmt: skip
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(UserError, match=message):
            make_source({**spec, "path": str(tmp_path / "x.tar")})
    with pytest.raises(UserError, match="no file matches"):
        make_source({**spec, "path": f"{tmp_path}/none*.tar"})


def test_what_a_shard_lost_is_counted(tmp_path):
    """Six samples of two files; where the fourth's first header is none, three are left and one is counted."""
    path = shard(tmp_path / "a.tar", [m for i in range(6) for m in sample(i)])
    whole = Path(path).read_bytes()
    fourth = [member.offset for member in tarfile.open(path)][6]
    cut = "the shard is cut off"

    def found(*shards):
        for i, data in enumerate(shards):
            (tmp_path / f"s{i}.tar").write_bytes(data)
        pattern = f"{tmp_path}/s{{0..{len(shards) - 1}}}.tar"
        return source_of("webdataset", path=pattern, recipe="caption", index_workers=1)

    for data in (
        whole[:fourth],
        whole[: fourth + 100],
        whole[: fourth + 511],
        whole[:fourth] + b"x" + whole[fourth + 1 :],  # its check sum is wrong
        whole[:fourth] + bytes(512) + whole[fourth:],  # as `cat` joins archives, or a hole in a download
        whole[:fourth] + bytes(10**6),
    ):
        source = found(data)
        assert len(source) == 4 and problems(source) == {3: cut}
        with pytest.raises(BrokenExample, match="after 00002"):
            source[3]
    assert not problems(found(whole)) and not problems(found(whole[:fourth] + bytes(1024)))
    for nothing in b"", bytes(10**6):
        assert problems(found(nothing, whole)) == {0: cut} and len(found(whole, nothing)) == 7
        with pytest.raises(UserError, match="hold no sample"):
            found(nothing)
    for empty in bytes(1024), bytes(10240):  # as bsdtar and GNU tar write an archive of nothing
        assert len(found(whole, empty)) == 6


def test_members_with_several_suffixes(tmp_path):
    members = [
        ("1.in.png", png("RGB", (1, 0, 0))), ("1.out.png", png("RGB", (2, 0, 0))), ("1.txt", b"plain"),
        ("1.prompt.txt", b"a prompt"), ("1.json", b'{"title": "own"}'), ("1.cls", b"7"),
        ("1.meta.json", b'{"by": "me", "sizes": [4, 5]}'), ("1.tags.json", b'["x", "y"]'), ("1.first.cls", b"8"),
        ("1.long.name.txt", b"all of it"),
    ]  # fmt: skip
    path = shard(tmp_path / "a.tar", members)
    source = source_of(
        "webdataset", path=path, recipe="edit", images=("in.png", "out.png"),
        caption_format="{text}, {prompt}, {meta[by]}, {meta[sizes][1]}, {tags[0]}, {title}, {cls}, {first_cls}, "
        "{long_name}",
    )  # fmt: skip
    assert texts(source[0]) == [("draw: plain, a prompt, me, 5, x, own, 7, 8, all of it", False)]
    assert [shape_of(source[0])[i][1] for i in (0, 2)] == [[1, 0, 0], [2, 0, 0]]


def test_what_lies_beside_the_samples_is_passed_over(tmp_path):
    first, second = sample(1), sample(2)
    members = [
        ("README", b"x"), ("__meta__.json", b"{}"), ("._00001.jpg", b"mac"), first[0], first[1],
        ("a/.DS_Store", b"mac"), second[0], ("LICENSE", b"x"), second[1], ("._00002.txt", b"mac"), (".git", b"x"),
    ]  # fmt: skip
    source = source_of("webdataset", path=shard(tmp_path / "a.tar", members), recipe="caption")
    assert [texts(source[i])[1][0] for i in range(len(source))] == ["number 1", "number 2"]
    members += [("../.hidden", b"x")]
    source = source_of("webdataset", path=shard(tmp_path / "a.tar", members), recipe="caption")
    assert problems(source) == {2: "a name outside its folder"}


def test_shards_are_indexed_in_parallel_and_anywhere(tmp_path):
    for s in range(3):
        shard(tmp_path / f"{s}.tar", sample(s))
    spec = dict(kind="webdataset", path=f"{tmp_path}/?.tar", recipe="caption")
    source = make_source({**spec, "index_dir": str(tmp_path / "work"), "index_workers": 2}).source
    assert [texts(source[i])[1][0] for i in range(3)] == ["number 0", "number 1", "number 2"]
    assert len(list((tmp_path / "work").iterdir())) == 3 and not list(tmp_path.glob("*.index"))


NEW_FORMAT = """
from pisces_jax.data import storage
from pisces_jax.data.formats.records import labels, picture_file
from pisces_jax.data.recipes import Record


class Tabbed:
    names, remote = ("text",), False

    def __init__(self, path, folder="pictures", name="tabbed"):
        (self.path,) = storage.expand(path)
        self.folder, (self.label,) = folder, labels(name, [self.path])
        self.lines = storage.read(self.path).decode().splitlines()
        self.fingerprint = f"{storage.digest([self.path, storage.signature(self.path)])}/{folder}"

    def __len__(self):
        return len(self.lines)

    def read(self, i, fields=None):
        file, text = self.lines[i].split("\\t")
        key = f"{self.label}/{i}"
        return Record(key, {"text": text}, [picture_file(file, self.folder, key)])
"""


def test_a_new_format_is_one_file_and_a_line_of_the_table(pictures, monkeypatch):
    """With what the protocol asks for, and nothing else: recipe, splits, names and misspelt keys come with it."""
    (pictures / "tabbed_format.py").write_text(NEW_FORMAT)
    monkeypatch.syspath_prepend(pictures)
    monkeypatch.setitem(sources.READERS, "tabbed", "tabbed_format:Tabbed")
    (pictures / "a.tsv").write_text("red.png\tone\nblue.png\ttwo\ngone.png\tthree\n../red.png\tfour\n")
    spec = dict(kind="tabbed", path=f"{pictures}/*.tsv", folder=str(pictures), recipe="pair", name="mine")
    source = pickle.loads(pickle.dumps(make_source(spec).source))
    assert [shape_of(source[i]) for i in range(2)] == [[RED, ("one", False)], [BLUE, ("two", False)]]
    assert problems(source) == {2: "a picture is missing", 3: "a name outside its folder"}
    assert source[1].key == "mine/a.tsv/1"
    assert texts(make_source({**spec, "split": "val", "val_share": 0.5}).source[0]) == [("two", False)]
    with pytest.raises(UserError, match="source mine: tabbed takes no 'foldr' .did you mean 'folder'"):
        make_source({**spec, "foldr": "x"})
    with pytest.raises(UserError, match="'caption', but the fields are text"):
        make_source({**spec, "caption_format": "{caption}"})


# Fingerprints: what is kept of a source (lengths, features) belongs to its files and its choice of pictures


def test_a_fingerprint_holds_files_and_pictures(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    def write(path, *objects):
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for one in objects:
            writer.write(json.dumps(one).encode())
        writer.close()

    tar = shard(tmp_path / "a.tar", [("1.jpg", jpeg((1, 0, 0))), ("1.png", png("RGB", (2, 0, 0))), ("1.txt", b"one")])
    write(tmp_path / "a.array_record", {"image": "red.png", "text": "red"})
    for spec, changes in (
        (dict(kind="webdataset", path=tar), [dict(images=names) for names in (("jpg",), ("png",), ("png", "jpg"))]),
        (dict(kind="array_record", path=f"{tmp_path}/a.array_record"), [
            dict(images=("other",)), dict(image_root="/pictures"), dict(image_root="/others")
        ]),
    ):  # fmt: skip
        made = [source_of(**spec, **change, recipe="caption") for change in ({}, {}, *changes)]
        assert made[0].fingerprint == made[1].fingerprint
        for kind in ("fingerprint", "pictures_fingerprint"):
            assert len({getattr(source, kind) for source in made}) == len(changes) + 1


def test_a_prepared_set_that_was_made_again_is_another(tmp_path):
    """The same folder and split, other files."""
    shutil.copytree(real("tfds") / "cifar10" / "3.0.2", tmp_path / "cifar10" / "3.0.2")
    spec = dict(kind="tfds", dataset="cifar10", data_dir=tmp_path, split="test")
    spec |= dict(recipe="pair", caption_format="{label}")
    before = source_of(**spec).fingerprint
    assert source_of(**spec).fingerprint == before
    (file,) = (tmp_path / "cifar10/3.0.2").glob("*test*array_record*")
    os.utime(file, (1, 1))
    assert source_of(**spec).fingerprint != before


# ArrayRecord


def test_many_record_files_are_read_with_few_descriptors(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    def write(f, *words):
        path = tmp_path / f"{f:03d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for word in words:
            writer.write(json.dumps({"image": "x.png", "text": word}).encode())
        writer.close()
        return path

    n = 3 * record_files.OPEN_READERS
    paths = [write(f, f"a{f}", f"b{f}") for f in range(n)]
    source = source_of("array_record", path=f"{tmp_path}/*.array_record", recipe="caption")
    record_files._reader.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    copied = pickle.loads(pickle.dumps(source))
    assert len(copied) == 2 * n
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: texts(copied[i])[1][0], [*range(2 * n), *range(2 * n)]))
    assert found == 2 * [f"{letter}{f}" for f in range(n) for letter in "ab"]
    assert len(os.listdir("/proc/self/fd")) - before <= record_files.OPEN_READERS
    # One that is replaced is opened again; damage is told from what is gone.
    os.replace(write(999, "new", "newer"), paths[1])
    assert texts(copied[2])[1][0] == "new"
    data = paths[2].read_bytes()
    first = data.index(b'"a2"')
    paths[2].write_bytes(data[:first] + b'"xx"' + data[first + 4 :])
    paths[3].write_bytes(data[:1000])
    paths[4].unlink()
    found = {}
    for i in range(2 * n):
        try:
            copied[i]
        except BrokenExample as error:
            found[i] = error.reason
    assert found == {4: "a damaged record"} | dict.fromkeys(range(6, 10), "the file is gone or cannot be read")
    with pytest.raises(UserError, match=r"003\.array_record cannot be read as ArrayRecord: fix or remove"):
        source_of("array_record", path=f"{tmp_path}/*.array_record", recipe="caption")


# Parquet


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "beside.png").write_bytes(png("RGB", (0, 0, 255)))
    rows = [{"image": {"bytes": png("RGB", (i, 0, 0)), "path": None}, "text": f"number {i}"} for i in range(7)]
    rows[3]["image"] = None
    rows[4]["image"] = {"bytes": None, "path": "beside.png"}
    rows[5]["image"] = {"bytes": None, "path": "../beside.png"}
    rows[6]["image"] = {"bytes": b"", "path": None}
    rows.append({**rows[0], "text": None})
    for f, part in enumerate((rows[:3], rows[3:])):
        table = pyarrow.Table.from_pylist(part, schema=pyarrow.schema({
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "text": pyarrow.string()
        }))  # fmt: skip
        pyarrow.parquet.write_table(table, tmp_path / f"part-{f}.parquet", row_group_size=2)
    spec = dict(kind="parquet", path=f"{tmp_path}/*.parquet", recipe="caption")
    source = pickle.loads(pickle.dumps(make_source(spec).source))
    assert len(source) == 8
    for i in range(3):
        assert shape_of(source[i]) == [("read", [i, 0, 0]), ("caption:", False), (f"number {i}", True)]
    assert shape_of(source[4])[0] == BLUE and source[4].key == "parquet/part-1.parquet/1"
    missing = "a picture is missing"
    assert problems(source) == {3: missing, 5: "a name outside its folder", 6: missing, 7: "a field is missing"}
    with pytest.raises(UserError, match="has no column 'picture', only image, text: set images"):
        make_source({**spec, "images": ("picture",)})
    with pytest.raises(UserError, match="'caption', but the fields are text"):
        make_source({**spec, "caption_format": "{caption}"})
    # What is damaged is told from what is gone: the latter may come back.
    path = tmp_path / "part-0.parquet"
    data = path.read_bytes()
    for content, reason in ((data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :], "a damaged row group"), (
        None, "the file is gone or cannot be read"
    )):  # fmt: skip
        parquet._kept.clear()
        times = path.stat()
        path.unlink() if content is None else path.write_bytes(content)
        if content is not None:  # a disk that fails leaves the time; who writes the file anew does not
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert problems(source)[0] == reason
    path.write_bytes(data)
    path = tmp_path / "part-1.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read as a Parquet file"):
        make_source(spec)


# Keys


def test_every_example_of_a_mixture_has_a_key_of_its_own(tmp_path):
    """Files of one name in folders of one name, as published sets have them: keys seed noise and dropped captions."""
    import pyarrow
    import pyarrow.parquet

    for folder in ("cc/train", "laion/train"):
        place = tmp_path / folder
        place.mkdir(parents=True)
        shard(place / "0.tar", sample(1) + sample(2))
        jsonl(place / "a.jsonl", {"text": "a"}, {"text": "b"})
        array_record(place / "r", json.dumps({"text": "a"}).encode(), json.dumps({"text": "b"}).encode())
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"x", b"y"], "text": ["a", "b"]}), place / "p.parquet")

    def keys(root):
        found = []
        for kind, file in ("webdataset", "0.tar"), ("json", "a.jsonl"), ("array_record", "r"), ("parquet", "p.parquet"):
            more = dict(index_workers=1) if kind == "webdataset" else {}
            # In one source, and each in its own.
            for name, folders in ("both", ("cc", "laion")), ("cc", ("cc",)), ("laion", ("laion",)):
                path = [f"{root}/{folder}/train/{file}" for folder in folders]
                records = make_source(dict(kind=kind, name=name, path=path, recipe="pair", **more)).source.records
                found += [records.read(i).key for i in range(len(records))]
        return found

    found = keys(tmp_path)
    assert len(found) == len(set(found)) == 4 * (4 + 2 + 2)
    assert found[:6] == [f"both/{one}/train/0.tar/0000{i}" for one in ("cc", "laion") for i in (1, 2)] + [
        "cc/0.tar/00001", "cc/0.tar/00002"
    ]  # fmt: skip
    os.makedirs(tmp_path / "elsewhere/deeper")
    for folder in "cc", "laion":
        os.rename(tmp_path / folder, tmp_path / "elsewhere/deeper" / folder)
    assert keys(tmp_path / "elsewhere/deeper") == found  # wherever the data lies


def test_the_full_size_configs_read_what_the_docs_lay_out(tmp_path, monkeypatch):
    """docs/data.md, "Public data sets": every source of every stage, what is held out of it too."""
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.tokenizer import entries_of

    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    for name in ("captions", "detailed", "instructions"):
        (tmp_path / name).mkdir()
        more = {"json": b'{"detailed": "long"}'} if name == "detailed" else {}
        members = [sample(i, b"short", **{f"{i:05d}.{k}": v for k, v in more.items()}) for i in range(100)]
        shard(tmp_path / name / "0.tar", sum(members, []))
    (tmp_path / "instructions/images").mkdir()
    (tmp_path / "instructions/images/red.png").write_bytes(png("RGB", (255, 0, 0)))
    (tmp_path / "instructions/conversations.json").write_text(json.dumps([LLAVA] * 100))
    drawn = [("draw: long", False), "draw"]
    described = [("draw: short", False), ("long", True), "draw"]
    expected = {
        "decoder": {"pair": ["read", ("short", False)]},
        "stage1": {
            "caption": ["read", ("caption:", False), ("short", True)], "draw_caption": [("draw: short", False), "draw"]
        },
        "stage2": {
            "describe": ["read", ("describe:", False), ("long", True)], "draw_details": drawn,
            "draw_described": described,
        },
        "stage3": {
            "conversation": ["read", *LLAVA_PARTS[1:]], "draw_caption": [("draw: short", False), "draw"],
            "draw_described": described,
        },
    }  # fmt: skip
    root = Path(__file__).parents[1] / "configs"
    for size in ("pisces_8b", "pisces_1b"):
        for stage, wanted in expected.items():
            (config,) = load_stages(str(root / size / f"{stage}.py"), {}).values()
            for split, count in (config.data.train, 99), (config.data.evaluate, 1):
                found = {}
                for entry in entries_of(split):
                    assert len(entry.source) == count
                    parts = [
                        (role if role in ("read", "draw") else (role, learn))
                        for role, learn in shape_of(entry.source[0])
                    ]
                    found[entry.name] = parts
                    assert entry.source.draws == ("draw" in parts)
                assert found == wanted


# Buckets


@pytest.fixture
def bucket(monkeypatch):
    """fsspec's memory as the bucket, with a count of requests and a way to make them fail."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    yield system
    system.store.clear()


def test_sources_on_a_bucket(bucket, tmp_path, folder):
    members = [m for i in range(3) for m in sample(i)]
    bucket.pipe("/data/s0.tar", Path(shard(tmp_path / "s0.tar", members)).read_bytes())
    for path in folder.iterdir():
        if path.is_file():
            bucket.pipe(f"/folder/{path.name}", path.read_bytes())
    bucket.pipe("/talk/talk.json", json.dumps([LLAVA]).encode())
    bucket.pipe("/talk/red.png", png("RGB", (255, 0, 0)))
    shards = source_of("webdataset", path="memory://data/*.tar", recipe="caption", index_dir=str(tmp_path / "index"))
    assert [texts(shards[i])[1][0] for i in range(3)] == ["number 0", "number 1", "number 2"] and not problems(shards)
    pictures = image_folder("memory://folder")
    assert len(pictures) == 200 and (picture(pictures[9]).array() == [9, 0, 0]).all()
    assert shape_of(source_of("json", path="memory://talk/talk.json", recipe="conversation")[0]) == LLAVA_PARTS


@pytest.fixture
def requests(bucket, monkeypatch):
    """The paths of all requests for bytes."""
    asked = []
    real = type(bucket).cat_file

    def noted(self, path, start=None, end=None):
        asked.append(path)
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(bucket), "cat_file", noted)
    return asked


def test_remote_metadata_is_read_once(bucket, requests, folder):
    for path in folder.iterdir():
        bucket.pipe(f"/folder/{path.name}", path.read_bytes())
    bucket.pipe("/talk/a.jsonl", b"\n".join(json.dumps({**LLAVA, "image": None}).encode() for _ in range(50)))
    bucket.pipe("/talk/b.json", json.dumps([{"text": "b"}] * 50).encode())
    for make, key, files, length in (
        (lambda: image_folder("memory://folder", recipe="caption"), lambda source, i: source[i].key, 1, 200),
        (
            lambda: source_of("json", path="memory://talk/*", recipe="pair").records,
            lambda records, i: records.read(i).key, 2, 100,
        ),
    ):  # fmt: skip
        requests.clear()
        source = make()
        assert len(source) == length and len(requests) == files
        first = [key(source, i) for i in range(length)]
        assert len(requests) == files
        copied = pickle.loads(pickle.dumps(source))  # a worker process
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda i: key(copied, i), range(length))) == first  # noqa: B023
        assert len(requests) == 2 * files


def test_members_that_no_field_needs_are_not_fetched(bucket, requests, tmp_path):
    about = json.dumps({"caption": "from json", "text": "json's text"}).encode()

    def make(members, recipe="caption", **spec):
        bucket.pipe("/s.tar", Path(shard(tmp_path / "s.tar", members)).read_bytes())
        source = source_of("webdataset", path="memory://s.tar", recipe=recipe, index_dir=str(tmp_path / "i"), **spec)
        requests.clear()
        example = source[0]
        fetched = len(requests)
        picture(example).array()
        assert len(requests) == fetched + 1
        return texts(example)[-1][0], fetched

    jpg, txt, js, cls = ("1.jpg", jpeg((1, 0, 0))), ("1.txt", b"from txt"), ("1.json", about), ("1.cls", b"7")
    assert make([jpg, js, txt, cls]) == ("from txt", 1)
    assert make([jpg, txt, js]) == ("from txt", 1)  # in any order
    assert make([jpg, js, txt, cls], caption_format="{caption}") == ("from json", 1)
    assert make([jpg, js, txt, cls], caption_format="{caption} {cls}") == ("from json 7", 2)
    assert make([jpg, js, txt, cls], caption_format="{text[0]} {cls}") == ("f 7", 3)  # cls may be in the json
    assert make([jpg, js, txt, cls], caption_format="a picture") == ("a picture", 0)
    assert make([jpg, txt, cls], caption_format="{text:{cls}}")[0] == "from txt"
    turns = ("1.json", json.dumps({"conversations": LLAVA["conversations"]}).encode())
    assert make([jpg, turns, txt, cls], recipe="conversation") == ("Yes.", 3)


def test_lengths_of_remote_shards_are_read_many_at_once(bucket, tmp_path, monkeypatch):
    n = 4 * lengths.THREADS
    members = [m for i in range(n) for m in sample(i % 200, f"{i} words".encode())]
    members = [(f"{k // 2:05d}{name[5:]}", data) for k, (name, data) in enumerate(members)]
    local = shard(tmp_path / "s.tar", members)
    bucket.pipe("/s.tar", Path(local).read_bytes())
    sources = [
        source_of("webdataset", path=path, recipe="caption", index_dir=str(tmp_path / "i"))
        for path in ("memory://s.tar", local)
    ]
    together = threading.Barrier(lengths.THREADS, timeout=60)
    real = type(bucket).cat_file

    def waits(self, path, start=None, end=None):
        together.wait()
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(bucket), "cat_file", waits)
    layout = Layout(4, 4, 64, 1, 1, 1, 8, 8)
    remote, here = (lengths.scan_lengths(source, tiny.Letters(), layout) for source in sources)
    assert not remote.reasons
    for a, b in zip(remote[:3], here[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bucket_that_fails_or_hangs_is_given_up(bucket, monkeypatch):
    bucket.pipe("/a.bin", b"0123456789")
    assert storage.read("memory://a.bin", 2, 3) == b"234" and storage.size("memory://a.bin") == 10
    calls = []
    real = type(bucket).cat_file

    def flaky(self, path, start=None, end=None):
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(bucket), "cat_file", flaky)
    assert storage.read("memory://a.bin") == b"0123456789" and len(calls) == 3
    monkeypatch.setattr(type(bucket), "cat_file", lambda self, path, start=None, end=None: threading.Event().wait(60))
    monkeypatch.setattr(storage, "TIME_LIMIT", 0.05)
    began = time.monotonic()
    with pytest.raises(storage.Unreachable, match="in 4 attempts .no answer in 0.05 s."):
        storage.read("memory://a.bin")
    assert time.monotonic() - began < 5
    with pytest.raises(storage.Unreachable, match="cannot be read"):
        storage.signature("memory://missing.bin")
    with pytest.raises(UserError, match="no known kind of storage"):
        storage.read("nonsense://a")


def test_a_large_file_comes_in_blocks(bucket, monkeypatch, tmp_path):
    """A request has the time limit of one block, whatever the size of the file."""
    monkeypatch.setattr(storage, "BLOCK", 1000)
    data = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    asked = []
    real = type(bucket).cat_file

    def noted(self, path, start=None, end=None):
        assert start < max(1, self.size(path)), "a request beyond the end is an error of some buckets"
        asked.append(end - start)
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(bucket), "cat_file", noted)
    for length in (4000, 2500, 1000, 999, 1, 0):
        bucket.pipe("/a.bin", data[:length])
        (tmp_path / "a.bin").write_bytes(data[:length])
        for path in ("memory://a.bin", str(tmp_path / "a.bin")):
            for start, wanted in ((0, None), (0, 1000), (0, 2500), (500, 2200), (700, None), (10, 9000), (0, 10)):
                if start <= length:
                    expected = data[:length][start:][:wanted]
                    assert storage.read(path, start, wanted) == expected, (path, length, start, wanted)
    assert max(asked) == 1000


def test_lines_are_found(pictures):
    path = jsonl(pictures / "talk.jsonl", *({**LLAVA, "id": "x" * i} for i in range(40)))
    for cut in (0, 1):  # with and without a line feed at its end
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) - cut])
        spans = source_of("json", path=path, recipe="conversation").records._spans
        assert [len(line) for line in whole.splitlines()] == spans[:, 1].tolist()
        assert [whole[start : start + length] for start, length in spans.tolist()] == whole.splitlines()


def test_patterns(tmp_path):
    assert storage.expand("a/{00..02}-{x,y}.tar") == [f"a/0{i}-{k}.tar" for i in range(3) for k in "xy"]
    assert storage.expand(["b", "a"]) == ["b", "a"]
    for name, fine in (
        ("a.png", True), ("a/b.png", True), ("../a", False), ("a/../../b", False), ("/a", False), ("", False),
        ("gs://b/a", False), (None, False), ("a/../b", True),
    ):  # fmt: skip
        assert storage.inside(name) == fine, name


def test_every_kind_of_picture_becomes_rgb():
    def colour(data):
        array = load_image(data)
        assert array.shape == (4, 4, 3) and array.dtype == np.uint8
        return array[0, 0].tolist()

    assert colour(png("RGB", (1, 2, 3))) == [1, 2, 3]
    assert colour(png("L", 100)) == [100] * 3
    assert colour(png("1", 1)) == [255] * 3
    assert colour(png("I;16", 30000)) == [round(30000 / 257)] * 3
    assert colour(b"P5 4 4 65535\n" + struct.pack(">16H", *[30000] * 16)) == [round(30000 / 257)] * 3
    for mode, value in ("I", 200), ("F", 0.5):  # what is white in them is not known
        file = io.BytesIO()
        Image.new(mode, (4, 4), value).save(file, "TIFF")
        with pytest.raises(UnreadablePicture, match="neither 8 nor 16 bits"):
            load_image(file.getvalue())
    assert colour(png("RGBA", (200, 0, 0, 0))) == [255] * 3
    half = colour(png("RGBA", (200, 0, 0, 128)))
    assert np.abs(np.array(half) - (np.array([200, 0, 0]) * 128 + 255 * 127) / 255).max() <= 1
    assert colour(png("LA", (0, 0))) == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for options, expected in (({}, [10, 20, 30]), ({"transparency": 1}, [255] * 3)):
        file = io.BytesIO()
        palette.save(file, "PNG", **options)
        assert colour(file.getvalue()) == expected
    file = io.BytesIO()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    assert np.abs(np.array(colour(file.getvalue())) - [255, 0, 0]).max() < 12


def test_exif_orientation():
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    upright = load_image(file.getvalue())
    assert upright.shape == (8, 4, 3) and upright[:4].min() == 255 and upright[4:].max() == 0
    # All eight, against PIL's own way.
    array = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
        assert (load_image(file.getvalue()) == np.asarray(expected)).all()
    # The resolution beside it is no number: PIL decodes the picture all the same.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    for damaged in exif, b"Exif\0\0nonsense":
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", exif=damaged)
        decoded = np.asarray(Image.open(io.BytesIO(file.getvalue())))
        expected = np.rot90(decoded, -1) if damaged is exif else decoded  # a quarter clockwise
        assert (load_image(file.getvalue()) == expected).all()


def test_broken_pictures_are_named(tmp_path):
    whole = png("RGB", (1, 2, 3), (200, 200))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    thread = png("RGB", (1, 2, 3), (1, 50_000))
    broken = {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"hello", "bomb.png": bomb}
    broken["thread.png"] = thread
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadablePicture, match=name):
            load_image(tmp_path / name)
        with pytest.raises(UnreadablePicture, match="key7"):
            load_image(data, "key7")
    with pytest.raises(UnreadablePicture, match="missing.png"):
        load_image(tmp_path / "missing.png")


def test_scaled_jpeg_decoding_is_near_the_exact_one(tmp_path):
    """A smooth picture: what a quarter of the size leaves out, resizing leaves out too."""
    x, y = np.meshgrid(np.linspace(0, 3, 640), np.linspace(0, 2, 480))
    array = np.stack([np.sin(x), np.cos(y), np.sin(x * y)], axis=-1) * 100 + 128
    file = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(file, "JPEG", quality=95)
    data = file.getvalue()
    assert load_image(data).shape == (480, 640, 3)
    assert load_image(data, at_least=240).shape == (240, 320, 3)  # exactly a half
    assert load_image(data, at_least=241).shape == (480, 640, 3)
    assert load_image(data, at_least=64).shape == (120, 160, 3)  # an eighth would be 60
    exact, scaled = (fit(load_image(data, at_least=n), 64).astype(int) for n in (0, 64))
    assert np.abs(exact - scaled).mean() < 1.5
    assert load_image(png("RGB", (1, 2, 3), (64, 64)), at_least=8).shape == (64, 64, 3)  # JPEG alone


def test_fit():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    assert fit(image, 40) is image
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle square
    assert (fit(wide, 20) == 255).all()
    assert fit(wide.transpose(1, 0, 2), 10).shape == (10, 10, 3)
    assert fit(image, 64).shape == (64, 64, 3) and fit(np.zeros((1, 1000, 3), np.uint8), 8).shape == (8, 8, 3)
    # Against PIL's own way for a whole number of pixels.
    expected = Image.fromarray(image[:, :20]).resize((10, 20), Image.Resampling.BICUBIC)
    assert (fit(image[:, :20], 10) == np.asarray(expected)[5:15]).all()


def test_reading_needs_neither_jax_nor_tensorflow():
    program = (
        "import sys, pisces_jax.data.packing.rows, pisces_jax.data.packing.pairs, pisces_jax.data.sources\n"
        "sys.exit(' '.join({'jax', 'tensorflow', 'torch'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
