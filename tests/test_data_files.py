"""Files that are not what their names say, and values that are not what a reader expects."""

import base64
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample, Text, identity
from pisces_jax.data.formats.records import picture
from pisces_jax.data.images import UnreadablePicture, load_image
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.packing.lengths import scan_lengths
from pisces_jax.data.recipes import Recipe, Record
from pisces_jax.data.sources import make_source
from pisces_jax.utils.errors import UserError, cut
from pisces_jax.utils.files import sniff


def png(*colour, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (2, 2), colour if len(colour) > 1 else colour[0]).save(file, "PNG", **options)
    return file.getvalue()


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(png(*colour))
    return tmp_path


def name_of(part):
    if isinstance(part, Text):
        return f"[{part.text}]" if part.learn else part.text
    (name,) = [name for name, colour in COLOURS.items() if (part.array()[0, 0] == colour).all()]
    return f"{part.role} {name}"


def parts(source, i=0):
    """The parts in short, or the message for an example that cannot be used."""
    try:
        return [name_of(part) for part in source[i].parts]
    except BrokenExample as error:
        return str(error)


def jsonl(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


def open_json(folder, *objects, **spec):
    return make_source(dict(kind="json", path=jsonl(folder / "a.jsonl", *objects), **spec)).source


def parquet(folder, rows, schema=None, **spec):
    path = folder / "a.parquet"
    with open(path, "wb") as file:  # Arrow takes no name that is not UTF-8
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    return make_source(dict(kind="parquet", path=str(path), **spec)).source


def shard(folder, *members, **spec):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    spec = dict(kind="webdataset", path=str(folder / "a.tar"), recipe="pair", index_workers=1) | spec
    return make_source(spec).source


def talk(folder, *turns, field="messages", **fields):
    return parts(open_json(folder, {field: turns, **fields}, recipe="conversation"))


def said(speaker, content, **more):
    return {"role": speaker, "content": content, **more}


def array_record(path, *records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


# What a file is


@pytest.mark.parametrize(
    "first, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        ('[{"a": 1}]'.encode("utf-16-be"), "UTF-16"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"PK\x03\x04abc", "zip"),
        (bytes(600), "only zeros"),
        (b'{"text": "<html>"}', None),
        (b'\xef\xbb\xbf[{"a": 1}]', None),
        (b"PAR1", None),
        (b"\x5b\0\0\0\0\0\0\0{", None),  # safetensors
        (b"", None),
    ],
)
def test_first_bytes_say_what_a_file_is(first, words):
    found = sniff(first)
    assert found is None if words is None else found is not None and words in found


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "json", "array_record"])
@pytest.mark.parametrize(
    "data, words",
    [
        (POINTER, "is a git-lfs pointer without the data (run git lfs pull), not "),
        (gzip.compress(bytes(2000), mtime=0), "is compressed by gzip (unpack it), not "),
        ('[{"text": "a"}]'.encode("utf-16"), "is text in UTF-16 (convert it to UTF-8), not "),
        (b"<!doctype html>" + bytes(600), "is a web page"),
    ],
)
def test_every_reader_says_what_the_file_is(tmp_path, kind, data, words):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError) as error:
        make_source(dict(kind=kind, path=str(tmp_path / "a"), recipe="pair"))
    assert words in str(error.value)


def test_a_picture_that_is_a_pointer_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(POINTER)
    for source in POINTER, tmp_path / "a.png":
        with pytest.raises(UnreadablePicture, match="it is a git-lfs pointer"):
            load_image(source)


# Texts


def text_of(value, text_format="{text}"):
    try:
        return Recipe("caption", text_format).text(Record("key", {"text": value}, []))
    except BrokenExample as error:
        return error.reason


@pytest.mark.parametrize(
    "value, said",
    [
        (float("nan"), "a field is missing"),
        (float("-inf"), "a field is missing"),
        (np.float32("nan"), "a field is missing"),
        (1.5, "1.5"),
        ("nan", "nan"),
        (["only"], "only"),
        ([b"only"], "only"),
        (np.array([b"only"], object), "only"),
        (["a", ["b"]], "a field does not fit its format"),
        ([1, 2], "a field does not fit its format"),
        ([{"a": 1}], "a field does not fit its format"),
        ({"a": "b"}, "a field does not fit its format"),
        ([None], "a field is missing"),
        ([" "], "an empty text"),
    ],
)
def test_what_is_no_text_is_not_learned(value, said):
    assert text_of(value) == said


def test_of_several_captions_the_key_chooses_one():
    recipe = Recipe("question")
    fields = {"question": ["q0", "q1", "q2"], "answer": ["a0", "a1", "a2"]}
    chosen = [[recipe.text(Record(f"key{i}", fields, []), n) for n in (0, 1)] for i in range(300)]
    counts = [chosen.count([f"q{k}", f"a{k}"]) for k in range(3)]
    assert sum(counts) == 300 and min(counts) > 70  # answers go with their questions
    assert recipe.text(Record("key7", fields, [])) == chosen[7][0]


def test_nan_in_files(folder):
    (folder / "a.jsonl").write_text('{"image": "red.png", "text": NaN}\n{"image": NaN, "text": "a"}\n')
    source = make_source(dict(kind="json", path=str(folder / "a.jsonl"), recipe="pair")).source
    assert "a field is missing" in parts(source) and "a picture is missing" in parts(source, 1)
    rows = [{"image": png(255, 0, 0), "text": value} for value in (0.5, float("nan"))]
    source = parquet(folder, rows, recipe="pair")
    assert parts(source) == ["read red", "0.5"] and "a field is missing" in parts(source, 1)
    source = shard(folder, ("1.png", png(255, 0, 0)), ("1.json", b'{"text": Infinity}'))
    assert "a field is missing (text; it has text" in parts(source)
    assert talk(folder, said("user", "?"), said("assistant", 1.5)) == ["?", "[1.5]"]
    assert "its text is nan" in talk(folder, said("user", "?"), said("assistant", float("nan")))


def test_labels_of_parquet_have_the_names_of_the_schema(folder):
    label = {"_type": "ClassLabel", "names": ["grey_wolf", "owl"]}
    features = {"label": label, "many": {"feature": label, "_type": "Sequence"}, "old": [label], "inner": {"l": label}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    one = {"image": png(255, 0, 0), "label": 0, "many": [1], "old": [1], "inner": {"l": 1}, "plain": 1}
    rows = [one, {**one, "label": -1}, {**one, "label": 1}]
    schema = pyarrow.Table.from_pylist(rows).schema.with_metadata(metadata)
    caption = "{label} {many} {old[0]} {inner[l]} {plain}"
    source = parquet(folder, rows, schema, recipe="pair", caption_format=caption)
    assert parts(source)[1] == "grey wolf owl owl owl 1" and parts(source, 2)[1].startswith("owl")
    assert "a field is missing" in parts(source, 1)
    source = parquet(folder, rows, recipe="pair", caption_format="{label}")
    assert parts(source)[1] == "0"


# Pictures of a record


TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
ASKED = {"question": "What?", "answer": "This."}


@pytest.mark.parametrize("nothing", [{"image": None}, {"image": ""}, {"images": ["red.png", None]}, {"images": None}])
def test_a_null_picture_is_missing(folder, nothing):
    for recipe, fields in ("question", ASKED), ("conversation", {"conversations": TALK}):
        source = open_json(folder, {**fields, **nothing}, {**fields, "images": []}, fields, recipe=recipe)
        assert "a picture is missing" in parts(source)
        assert parts(source, 1) == parts(source, 2) == ["What?", "[This.]"]  # they have none


def test_a_null_among_several_pictures_moves_no_other(folder):
    three = [None, "green.png", "blue.png"]
    for fields, spec in (
        (dict(images=three), {}),
        (dict(zip("abc", three, strict=True)), dict(images=("a", "b", "c"))),
        (dict(zip("bc", three[1:], strict=True)), dict(images=("a", "b", "c"))),
    ):
        source = open_json(folder, {**fields, "text": "x"}, recipe="edit", **spec)
        assert "a picture is missing (number 1" in parts(source)
    rows = [{"images": [None, png(0, 255, 0), png(0, 0, 255)], "text": "x"}]
    assert "a picture is missing" in parts(parquet(folder, rows, recipe="edit", images=("images",)))
    rows = [{"a": None, "b": png(0, 0, 255), "text": "x"}]
    schema = pyarrow.schema({"a": pyarrow.binary(), "b": pyarrow.binary(), "text": pyarrow.string()})
    assert "a picture is missing" in parts(parquet(folder, rows, schema, recipe="edit", images=("a", "b")))


@pytest.mark.parametrize(
    "fields, found",
    [
        (dict(image="red.png", images=["red.png"]), ["read red"]),
        (dict(image="red.png", images=["red.png", "blue.png"]), ["read red", "read blue"]),
        (dict(image=None, images=["blue.png"]), ["read blue"]),
        (dict(image="red.png", images=[]), ["read red"]),
        (dict(image="red.png", images=["blue.png"]), "two fields of pictures"),
    ],
)
def test_image_and_images_are_one_field(folder, fields, found):
    shown = parts(open_json(folder, {**fields, **ASKED}, recipe="question"))
    assert found in shown if isinstance(found, str) else shown == [*found, "What?", "[This.]"]
    shown = parts(open_json(folder, {**fields, **ASKED}, recipe="question", images=("images",)))
    assert shown[-2:] == ["What?", "[This.]"]  # the config may say which


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_every_spelling_of_a_picture(folder):
    (folder / "more").mkdir()
    (folder / "more/blue.png").write_bytes(png(0, 0, 255))
    red = png(255, 0, 0)
    spellings = ["red.png", data_url(red), base64.b64encode(red).decode(), base64.urlsafe_b64encode(red).decode()]
    rows = [{"image": value, "text": "x"} for value in spellings]
    for source in parquet(folder, rows, recipe="pair"), open_json(folder, *rows, recipe="pair"):
        assert [parts(source, i) for i in range(len(rows))] == [["read red", "x"]] * len(rows)
    rows = [{"image": {"bytes": red, "path": "no.png"}, "text": "x"}, {"image": {"path": "red.png"}, "text": "x"}]
    assert parts(parquet(folder, rows, recipe="pair"), 1) == ["read red", "x"]
    source = parquet(folder, [{"image": "blue.png", "text": "x"}], recipe="pair", image_root=str(folder / "more"))
    assert parts(source) == ["read blue", "x"]
    for value, reason in (
        ("https://a.b/c.png", "a picture by its address"),
        ("data:image/svg+xml,%3Csvg", "a picture by its address"),
        ({"url": "x"}, "a picture of an unknown form (an object with url)"),
        ([1], "a name outside its folder"),
        (1.5, "a name outside its folder"),
    ):
        with pytest.raises(BrokenExample) as error:
            picture(value, ".", "key")
        assert reason in str(error.value)
    assert picture(float("nan"), ".", "key") is picture(b"", ".", "key") is picture({"bytes": b"", "path": ""}, ".", "")


# Conversations


@pytest.mark.parametrize(
    "question, found",
    [
        ("<Image>\nWhat?", "marks and pictures differ"),  # one mark for two pictures
        ("<image_1>: What? <image_2>", ["read red", ": What?", "read blue"]),
        ("<image 2> first, <image 1>", ["read blue", "first,", "read red"]),
        ("<|image_0|> and <|image_1|>", ["read red", "and", "read blue"]),
        ("<IMAGE> a <|image|> b", ["read red", "a", "read blue", "b"]),
        ("What?", ["read red", "read blue", "What?"]),
        ("<image_1> <image_1>", "marks and pictures differ"),
        ("<image_2> <image_3>", "marks and pictures differ"),
        ("<image> <image_2>", "marks and pictures differ"),
        ("<img>red.png</img> What?", "a mark that is not understood (<img>)"),
        ("<video>\nWhat?", "a mark that is not understood (<video>)"),
        ("<|vision_start|><|image_pad|>", "a mark that is not understood (<|vision_start|>)"),
        ("<video><a></video> <image/>", ["read red", "read blue", "<video><a></video> <image/>"]),  # HTML
    ],
)  # fmt: skip
def test_marks_of_pictures(folder, question, found):
    images = ["red.png", "blue.png"]
    for recipe, fields in (
        ("question", {"question": question, "answer": "This."}),
        ("conversation", {"conversations": [{"from": "human", "value": question}, TALK[1]]}),
    ):
        shown = parts(open_json(folder, {"images": images, **fields}, recipe=recipe))
        assert found in shown if isinstance(found, str) else shown == [*found, "[This.]"]


def test_turns_of_every_style(folder):
    nothing = {"from": None, "value": None}
    turns = [said("user", "What?", **nothing), said("assistant", "This.", **nothing)]
    assert talk(folder, *turns) == talk(folder, *turns, field="conversations") == ["What?", "[This.]"]
    mixed = [{"from": "human", "value": "What?", "role": None, "content": None}, turns[1]]
    assert talk(folder, *mixed, field="conversations") == ["What?", "[This.]"]
    spelt = open_json(folder, {"conversations": json.dumps(TALK)}, {"messages": "[{"}, recipe="conversation")
    assert parts(spelt) == ["What?", "[This.]"] and "not JSON" in parts(spelt, 1)
    rows = [{"image": png(255, 0, 0), "conversations": json.dumps(TALK)}]
    assert parts(parquet(folder, rows, recipe="conversation")) == ["read red", "What?", "[This.]"]


def test_what_a_turn_cannot_hold(folder):
    video = said("user", [{"type": "video"}, {"type": "text", "text": "What?"}])
    assert "a part of the type 'video'" in talk(folder, video, said("assistant", "x"), images=["red.png"])
    assert "an empty turn (turn 2)" in talk(folder, said("user", "a"), said("assistant", " "), said("user", "b"))
    assert "an empty turn (turn 3)" in talk(
        folder, said("user", "a"), said("assistant", "b"), said("user", ""), said("assistant", "c")
    )
    assert talk(folder, said("system", ""), said("user", "a"), said("assistant", "b")) == ["a", "[b]"]
    pictures = [said("user", [{"type": "image_url"}, {"type": "text", "text": "a"}]), said("assistant", "b")]
    assert talk(folder, *pictures, image="red.png") == ["read red", "a", "[b]"]


# Shards


RED, BLUE = png(255, 0, 0), png(0, 0, 255)


def test_the_plain_name_is_the_picture(folder):
    masks = [("1.mask.png", BLUE), ("1.depth.png", BLUE)]
    assert parts(shard(folder, *masks, ("1.png", RED), ("1.txt", b"x"))) == ["read red", "x"]
    assert parts(shard(folder, masks[0], ("1.txt", b"x"))) == ["read blue", "x"]
    assert "several pictures (depth.png, mask.png: set images" in parts(shard(folder, *masks, ("1.txt", b"x")))
    assert "several pictures (jpg, png: set" in parts(shard(folder, ("1.png", RED), ("1.jpg", b""), ("1.txt", b"x")))
    named = shard(folder, *masks, ("1.png", RED), ("1.txt", b"x"), images=("mask.png",))
    assert parts(named) == ["read blue", "x"]
    several = [("1.10.png", BLUE), ("1.2.png", RED), ("1.question.txt", b"What?"), ("1.answer.txt", b"This.")]
    source = shard(folder, *several, images="*.png", recipe="question")
    assert parts(source) == ["read red", "read blue", "What?", "[This.]"]
    assert "a picture is missing" in parts(shard(folder, *several, images="*.jpg", recipe="question"))


def test_the_first_dot_ends_a_name(folder):
    members = [(f"22.{n}.{kind}", data) for n in ("05", "06") for kind, data in (("png", RED), ("txt", b"x"))]
    for message in parts(shard(folder, *members)), parts(shard(folder, *members[:2])):
        assert "the first dot ends a sample's name, so that 22.05.jpg is the 05.jpg of sample 22" in message


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "members, found",
    [
        ([("1.txt", b"txt"), ("1.json", b'{"text": null}')], "txt"),
        ([("1.txt", b"txt"), ("1.json", b'{"text": "json"}')], "txt"),
        ([("1.txt", b"txt"), ("1.text", b"text"), ("1.caption", b"caption")], "txt"),
        ([("1.text", b"text"), ("1.caption", b"caption"), ("1.json", b'{"text": "json"}')], "text"),
    ],
)
def test_what_a_text_is_does_not_depend_on_the_order(folder, members, found, order):
    assert parts(shard(folder, ("1.png", RED), *members[::order])) == ["read red", found]


def test_a_member_of_its_own_is_taken_before_the_json(folder):
    about = ("1.json", b'{"prompt": "json", "style": "oil"}')
    spec = dict(caption_format="{prompt}, {style}")
    for order in (1, -1):
        for own in ("1.prompt.txt", b"own"), ("1.prompt.json", b'"own"'):
            assert parts(shard(folder, ("1.png", RED), *[own, about][::order], **spec))[1] == "own, oil"
        null = ("1.prompt.json", b"null")
        assert parts(shard(folder, ("1.png", RED), *[null, about][::order], **spec))[1] == "json, oil"


def sparse_shard(path, form):
    """As `tar -S` writes a file of 3,072 bytes of which only the last 512 are no zeros."""
    data, size = b"x" * 512, 3072
    info = tarfile.TarInfo("1.png")
    with tarfile.open(path, "w") as archive:
        if form == "gnu":
            info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
            header[483:495] = b"%011o\0" % size
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            archive.fileobj.write(bytes(header) + data)
            archive.offset += 1024
        else:
            about = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.png"}
            info.pax_headers = {**about, "GNU.sparse.realsize": str(size)}
            body = f"1\n{size - 512}\n512\n".encode().ljust(512, b"\0") + data
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        for name, content in ("1.txt", b"x"), ("2.png", RED), ("2.txt", b"y"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused(tmp_path, form):
    sparse_shard(tmp_path / "a.tar", form)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.extractfile("1.png").read() == bytes(2560) + b"x" * 512
    source = make_source(dict(kind="webdataset", path=f"{tmp_path}/a.tar", recipe="pair")).source
    assert "a sparse member" in parts(source) and parts(source, 1) == ["read red", "y"]


# Files that change, and files of several arrays


def test_parquet_that_is_written_again_is_read_again(folder):
    old = parquet(folder, [{"image": RED, "text": "old"}], recipe="pair")
    assert parts(old) == ["read red", "old"]
    new = parquet(folder, [{"picture": BLUE, "caption": "new"}], recipe="pair", images=("picture",),
                  caption_format="{caption}")  # fmt: skip
    assert parts(new) == ["read blue", "new"]
    assert "the file changed since it was opened" in parts(old)


def test_json_that_is_written_again_is_no_other_record(folder):
    source = open_json(folder, {"image": "red.png", "text": "old"}, recipe="pair")
    jsonl(folder / "a.jsonl", {"image": "blue.png", "text": "other"})
    os.utime(folder / "a.jsonl", (1, 1))
    assert "the file changed since it was opened" in parts(source)


@pytest.mark.parametrize("between", ["", "\n", " ,\n"])
def test_every_array_of_a_json_file_is_read(folder, between):
    one, two = ({"image": f"{name}.png", "text": name} for name in ("red", "blue"))
    path = folder / "a.json"
    path.write_text(between.join(json.dumps(each) for each in ([one], [two], [one, two])))
    source = make_source(dict(kind="json", path=str(path), recipe="pair")).source
    assert [parts(source, i)[1] for i in range(len(source))] == ["red", "blue", "red", "blue"]
    path.write_text(json.dumps([one]) + between + "nonsense")
    source = make_source(dict(kind="json", path=str(path), recipe="pair")).source
    assert len(source) == 2 and "not JSON" in parts(source, 1)


COCO = {"info": {}, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "whole, words",
    [
        (COCO, 'info, images, annotations: this is COCO\'s layout: .*"caption": "..."'),
        ({"version": "1", "data": [{"text": "a"}]}, "fields version, data: write only its array"),
    ],
)
def test_one_object_around_the_records_is_named(folder, whole, words, indent):
    (folder / "a.json").write_text(json.dumps(whole, indent=indent))
    with pytest.raises(UserError, match=words):
        make_source(dict(kind="json", path=str(folder / "a.json"), recipe="pair"))


def test_one_record_of_a_file_may_hold_lists(folder):
    boxes = {"image": "red.png", "text": "a", "boxes": [{"x": 1}]}
    assert parts(open_json(folder, boxes, recipe="pair")) == ["read red", "a"]
    assert parts(open_json(folder, {"conversations": TALK}, recipe="conversation")) == ["What?", "[This.]"]


# Names


@pytest.mark.parametrize("name", ["set[1]", "b{x}", "b{x,y}", "a*", "plain"])
def test_what_exists_is_no_pattern(tmp_path, name):
    for each in (name, "set1", "bx", "by", "ab"):
        (tmp_path / each).mkdir(exist_ok=True)
        for file in ("0.tar", "1.tar"):
            (tmp_path / each / file).touch()
    files = [f"{tmp_path}/{name}/{i}.tar" for i in (0, 1)]
    assert storage.expand(f"{tmp_path}/{name}/*.tar") == files
    assert storage.expand(f"{tmp_path}/{name}/{{0,1}}.tar") == files
    assert storage.expand(files[0]) == files[:1]
    (tmp_path / "bx/2.tar").touch()
    assert storage.expand(f"{tmp_path}/b{{x,y}}/[01].tar") == [
        f"{tmp_path}/{folder}/{i}.tar" for folder in (["b{x,y}"] if name == "b{x,y}" else ["bx", "by"]) for i in (0, 1)
    ]


def test_names_that_are_not_utf8(folder):
    odd = os.fsdecode(os.fsencode(str(folder)) + b"/\xff\xe9")
    try:
        os.mkdir(odd)
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    place = Path(odd)
    (place / "red.png").write_bytes(RED)
    expected = ["read red", "x"]
    record = {"image": "red.png", "text": "x"}
    assert parts(open_json(place, record, recipe="pair")) == expected
    assert parts(parquet(place, [record], recipe="pair")) == expected
    assert parts(shard(place, ("1.png", RED), ("1.txt", b"x"))) == expected
    jsonl(place / "metadata.jsonl", {"file_name": "red.png", "text": "x"})
    source = make_source(dict(kind="image_folder", path=odd, recipe="pair")).source
    assert parts(source) == expected and identity(source[0].key).shape == (2,)
    found = scan_lengths(source, tiny.Letters(), Layout(4, 4, 64, 1, 1, 1, 8, 8), folder=place / "lengths")
    assert found.tokens.min() > 0 and len(list((place / "lengths").iterdir())) == 1
    os.rename(array_record(folder / "r", json.dumps(record).encode()), place / "r")
    spec = dict(kind="array_record", path=f"{odd}/r", image_root=odd, recipe="pair")
    assert parts(make_source(spec).source) == expected


def test_values_in_messages_are_cut(folder):
    assert cut("x" * 300) == "x" * 300 and len(cut("x" * 10**6)) < 400
    long = "x/" * 500_000 + "a.png"
    source = open_json(folder, {"image": long, "text": ["a", {"b": "c" * 10**6}]}, {"image": long, "text": "a"},
                       recipe="pair")  # fmt: skip
    assert len(parts(source)) < 1000
    for make in (lambda: source[1].parts[0].array(), lambda: load_image(long)):
        with pytest.raises(UserError) as error:
            make()
        assert len(str(error.value)) < 1000
    with pytest.raises(BrokenExample) as error:
        source[1].parts[0].array()
    assert error.value.reason == "a picture is missing" and "too long" in str(error.value)  # it never was there
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": data_url(RED), "text": "x"}))
    assert parts(make_source(dict(kind="image_folder", path=str(folder), recipe="pair")).source) == ["read red", "x"]


# Pixels


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey16(values, transparent=None):
    """A 16-bit grey PNG by the specification: https://www.w3.org/TR/png-3/#11tRNS."""
    values = np.array(values, ">u2")
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    clear = chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_transparent_grey_of_16_bits_is_white():
    data = [[0, 1000, 1001, 65535]]
    assert load_image(grey16(data))[0, :, 0].tolist() == [0, 4, 4, 255]
    assert load_image(grey16(data, 1000))[0, :, 0].tolist() == [0, 255, 4, 255]
    assert load_image(grey16(data, 0))[0, :, 0].tolist() == [255, 4, 4, 255]


def test_white_is_zero_of_16_bits():
    values = np.array([[0, 257, 65535]], np.uint16)
    for photometric, expected in (1, [0, 1, 255]), (0, [255, 254, 0]):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF", tiffinfo={262: photometric})
        data = file.getvalue()
        with Image.open(io.BytesIO(data)) as image:
            if image.tag_v2[262] != photometric:  # PIL writes its own
                tag = struct.pack("<HHI", 262, TiffImagePlugin.ImageFileDirectory_v2().tagtype.get(262, 3), 1)
                at = data.index(tag) + 8
                data = data[:at] + struct.pack("<I", photometric) + data[at + 4 :]
        assert load_image(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("note", ["text", "profile", "international"])
def test_notes_do_not_cost_the_picture(note, tmp_path):
    info, options = PngImagePlugin.PngInfo(), {}
    if note == "profile":
        options["icc_profile"] = bytes(3 * 2**20)
    else:
        add = info.add_text if note == "text" else info.add_itxt
        add("Comment", "x" * (3 * 2**20), zip=True)
    data = png(255, 0, 0, pnginfo=info, **options)
    with pytest.raises(ValueError, match="too large"), Image.open(io.BytesIO(data)) as image:
        image.load()
    (tmp_path / "a.png").write_bytes(data)
    for source in data, tmp_path / "a.png":
        assert (load_image(source) == [255, 0, 0]).all()
    with pytest.raises(UnreadablePicture):
        load_image(data[:-40])  # what is cut is still refused
