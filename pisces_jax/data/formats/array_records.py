"""ArrayRecord files, plain ones and datasets that TensorFlow Datasets prepared; read without TensorFlow."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample
from pisces_jax.data.formats.record_files import RecordFiles, Span, count_records
from pisces_jax.data.formats.records import labels, locate, parse_object, picture, picture_files, reading
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError


class Tfds:
    """Records of a dataset that TensorFlow Datasets prepared in ArrayRecord files.

    `dataset` is a name below `data_dir`, with or without configuration and version ("cifar10", "cifar10/3.0.2");
    `split` is in TFDS's notation, with slices ("train[:90%]"). Labels are given by their names.

    Raises:
        UserError: the dataset, the split or the field of a picture is missing, or the files are on a bucket.
    """

    remote = False

    def __init__(self, dataset: str, split: str, data_dir: str | os.PathLike, images: Sequence[str] = ("image",)):
        import tensorflow_datasets as tfds  # here, as it takes a second and most runs have no such source

        _refuse_remote(os.fspath(data_dir))
        self.dataset, self.split, self.images = dataset, split, tuple(images)
        folder = _prepared_folder(Path(data_dir), dataset)
        builder = tfds.builder_from_directory(folder)
        self._features = builder.info.features
        for field in self.images:
            if field not in self._features:
                raise UserError(f"dataset {dataset} has no {field!r}, only {', '.join(self._features)}: set images")
        self._decoders = dict.fromkeys(self.images, tfds.decode.SkipDecoding())
        try:
            builder.as_data_source(split)  # refuses formats without random access
            files = builder.info.splits[split].file_instructions
            self._records = RecordFiles([Span(str(one.filename), one.skip, one.take) for one in files])
        except (ValueError, OSError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"split {split!r} of dataset {dataset} in {data_dir} cannot be opened ({reason}): "
                f"its splits are {', '.join(builder.info.splits)}"
            ) from error
        self._label_names = {
            field: feature.names
            for field, feature in self._features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        }
        self.names = [field for field in self._features if field not in self.images]
        paths = sorted(path for path in folder.iterdir() if ".array_record" in path.name)
        marks = storage.digest(f"{path.name} {storage.signature(str(path))}" for path in paths)
        self.fingerprint = f"{folder}/{marks}/{split}/{self.images}"

    def __len__(self) -> int:
        return len(self._records)

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        key = f"{self.dataset}/{self.split}/{i}"
        with reading(key, damaged="a damaged record", errors=(UserError, OSError, ValueError, RuntimeError)):
            record = dict(self._features.deserialize_example_np(self._records[i], decoders=self._decoders))
        pictures = [picture(record.pop(field), ".", key) for field in self.images]
        return Record(key, {field: self._plain(field, value) for field, value in record.items()}, pictures)

    def _plain(self, field: str, value: Any) -> Any:
        if field in self._label_names:
            return self._label_names[field][int(value)].replace("_", " ") if value >= 0 else None  # -1 is a hidden one
        return _text(value)


def _prepared_folder(data_dir: Path, name: str) -> Path:
    """The folder of the newest version. TFDS's own search is not used, as it asks the network.

    Raises:
        UserError: there is no such dataset, or it has several configurations, so that no version is the newest.
    """
    found = sorted(path.parent for path in (data_dir / name).glob("**/dataset_info.json"))
    if not found:
        raise UserError(f"no prepared dataset {name} in {data_dir}: set data_dir to where TFDS has prepared it")
    if len({path.parent for path in found}) > 1:
        choices = ", ".join(str(path.relative_to(data_dir)) for path in found)
        raise UserError(f"dataset {name} in {data_dir} has several configurations: set dataset to one of {choices}")
    return max(found, key=lambda path: [int(word) if word.isdigit() else 0 for word in path.name.split(".")])


def _refuse_remote(path: str) -> None:
    if storage.is_remote(path):
        raise UserError(
            f"ArrayRecord files cannot be read from {path} directly: mount the bucket (gcsfuse) and give that folder"
        )


class ArrayRecords:
    """Records of plain ArrayRecord files, each a serialized `tf.train.Example` or a JSON object.

    `path` is a pattern or a list of them. `images` names the features that hold encoded pictures, or the fields of JSON
    objects that hold paths of files below `image_root`.

    Raises:
        UserError: a file is missing, on a bucket, or not a complete ArrayRecord file.
    """

    names = None
    remote = False

    def __init__(
        self,
        path: str | Sequence[str],
        images: Sequence[str] = ("image",),
        image_root: str | None = None,
        name: str = "array_record",
    ):
        self.paths, self.images, self.image_root = storage.expand(path), tuple(images), image_root
        self._labels = labels(name, self.paths)
        for one in self.paths:
            _refuse_remote(one)
        signatures = [storage.signature(one) for one in self.paths]
        counts = [count_records(one) for one in self.paths]
        self._records = RecordFiles([Span(one, 0, count) for one, count in zip(self.paths, counts, strict=True)])
        self._ends = np.cumsum(counts)
        if not len(self._records):
            raise UserError(f"{self.paths[0]} holds no record: change path")
        self.fingerprint = f"{storage.digest([*self.paths, *signatures])}/{self.images}/{self.image_root}"

    def __len__(self) -> int:
        return len(self._records)

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        file, number = locate(self._ends, i)
        key = f"{self._labels[file]}/{number}"
        with reading(key, damaged="a damaged record"):
            data = self._records[i]
        if data[:1] == b"{":
            found = parse_object(data, key)
            return Record(key, found, picture_files(found, self.images, self.image_root or ".", key))
        found = parse_example(data, key)
        pictures: list[EncodedImage | None] = []
        for name in self.images:
            value = found.pop(name, None) or None
            root = self.image_root or "."
            pictures += [picture(one, root, key) for one in (value if isinstance(value, list) else [value])]
        return Record(key, {name: _text(value) for name, value in found.items()}, pictures)


def parse_example(data: bytes, key: str) -> dict[str, Any]:
    """The features of a serialized `tf.train.Example`: a feature's one value, or the list of its values.

    Raises:
        BrokenExample: the bytes are something else.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # its messages without TensorFlow

    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError as error:
        raise BrokenExample(key, "not a tf.train.Example", str(error)) from error
    if not features:
        raise BrokenExample(key, "not a tf.train.Example", "it has no feature")
    fields: dict[str, Any] = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        fields[name] = values[0] if len(values) == 1 else values
    return fields


def _text(value: Any) -> Any:
    """Bytes as text, in lists and objects too. What is not UTF-8 stays bytes: it may be a mask; recipes refuse it."""
    if isinstance(value, list):
        return [_text(one) for one in value]
    if isinstance(value, dict):
        return {name: _text(one) for name, one in value.items()}
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
