"""Pictures with texts from prepared datasets and folders, as sources of examples.

A *record* is a picture (decoded only when asked for), a short text and perhaps a detailed one, and a key. A
*recipe* makes an example of it, in the words of the shapes world, so that all sources can be mixed.
"""

import functools
import hashlib
import json
import os
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.data.example import Example, Part, Picture, Text
from pisces_jax.data.images import load_image
from pisces_jax.data.instructions import CAPTION_INSTRUCTION, DESCRIBE_INSTRUCTION, draw_instruction
from pisces_jax.errors import UserError

Image = Callable[[], np.ndarray]

# recipe: (image, short text, detailed text) -> parts
RECIPES: dict[str, Callable[[Image, str, str], tuple[Part, ...]]] = {
    "caption": lambda image, short, detailed: (
        Picture(image, "read"),
        Text(CAPTION_INSTRUCTION),
        Text(short, learn=True),
    ),
    "describe": lambda image, short, detailed: (
        Picture(image, "read"),
        Text(DESCRIBE_INSTRUCTION),
        Text(detailed, learn=True),
    ),
    "draw_caption": lambda image, short, detailed: (Text(draw_instruction(short)), Picture(image, "draw")),
    "draw_details": lambda image, short, detailed: (Text(draw_instruction(detailed)), Picture(image, "draw")),
    "draw_described": lambda image, short, detailed: (
        Text(draw_instruction(short)),
        Text(detailed, learn=True),
        Picture(image, "draw"),
    ),
    "pair": lambda image, short, detailed: (Picture(image, "read"), Text(short)),
}
NEED_DETAILS = ("describe", "draw_details", "draw_described")


class _Wording:
    """Fields of a record to an example, by two format strings and a recipe."""

    def __init__(self, where: str, recipe: str, caption_format: str, detailed_format: str | None):
        if recipe not in RECIPES:
            raise UserError(f"{where}: no recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
        if recipe in NEED_DETAILS and detailed_format is None:
            raise UserError(
                f"{where}: the recipe {recipe!r} needs a detailed text: set detailed_format, "
                "such as '{text}: {tags}'"
            )
        self.where, self.recipe = where, recipe
        self.caption_format, self.detailed_format = caption_format, detailed_format

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raises `UserError` where a format names a field that the records do not have."""
        for text_format in filter(None, (self.caption_format, self.detailed_format)):
            for _, name, _, _ in string.Formatter().parse(text_format):
                if name is not None and name not in fields:
                    raise UserError(
                        f"{self.where}: {text_format!r} names the field {name!r}, but the fields are "
                        f"{', '.join(sorted(fields))}: change the format"
                    )

    def example(self, image: Image, fields: Mapping[str, Any], key: str) -> Example:
        try:
            short = self.caption_format.format(**fields)
            detailed = self.detailed_format.format(**fields) if self.detailed_format else ""
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{key}: its fields do not fit the format ({error!r}): change one of them"
            ) from error
        return Example(RECIPES[self.recipe](image, short, detailed), key)


class TfdsPictures:
    """A prepared TensorFlow Datasets directory in ArrayRecord files, read without TensorFlow.

    `name` is a dataset of `data_dir`, with or without configuration and version ("cifar10", "cifar10/3.0.2");
    `split` is in TFDS's notation, slices included ("train[:90%]"). Formats may use every feature but the
    picture; labels go by their names. Raises `UserError` if the dataset, the split or a field is missing.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike,
        recipe: str,
        caption_format: str = "a photo of a {label}",
        detailed_format: str | None = None,
        image_field: str = "image",
    ):
        import tensorflow_datasets as tfds  # here, as it takes a second and most runs have no such source

        self._wording = _Wording(f"dataset {name}", recipe, caption_format, detailed_format)
        self.name, self.split, self._image_field = name, split, image_field
        folder = _prepared_folder(Path(data_dir), name)
        builder = tfds.builder_from_directory(folder)
        features = builder.info.features
        if image_field not in features:
            raise UserError(
                f"dataset {name} has no {image_field!r}, only {', '.join(features)}: set image_field"
            )
        self._labels = {
            field: feature.names
            for field, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        }
        try:
            self._records = builder.as_data_source(split, decoders={image_field: tfds.decode.SkipDecoding()})
            self._length = len(self._records)
        except (ValueError, OSError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"split {split!r} of dataset {name} in {data_dir} cannot be opened ({reason}): "
                f"its splits are {', '.join(builder.info.splits)}"
            ) from error
        self._wording.check(dict.fromkeys(field for field in features if field != image_field))
        self.fingerprint = f"{folder}/{split}/{recipe}/{caption_format}/{detailed_format}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Example:
        record = dict(self._records[int(i)])
        key = f"{self.name}/{self.split}/{int(i)}"
        image = record.pop(self._image_field)
        fields = {field: self._plain(field, value) for field, value in record.items()}
        return self._wording.example(functools.partial(load_image, image, key), fields, key)

    def _plain(self, field: str, value: Any) -> Any:
        if field in self._labels and value >= 0:  # TFDS marks a hidden label by -1
            return self._labels[field][int(value)].replace("_", " ")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _prepared_folder(data_dir: Path, name: str) -> Path:
    """The newest version's folder: found without TFDS's own search, which asks the network."""
    found = sorted(path.parent for path in (data_dir / name).glob("**/dataset_info.json"))
    if not found:
        raise UserError(
            f"no prepared dataset {name} in {data_dir}: set data_dir to where TFDS has prepared it"
        )
    return max(found, key=lambda path: [int(word) if word.isdigit() else 0 for word in path.name.split(".")])


class ImageFolder:
    """A folder of pictures with `metadata.jsonl`: a JSON object a line with `file_name` and any text fields.

    `split` is "train", "val" or "all"; a picture belongs to "val" by a hash of its name, so additions to the
    folder move nothing. Raises `UserError` if the folder, its metadata or a field is missing or misshapen.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        recipe: str,
        caption_format: str = "{text}",
        detailed_format: str | None = None,
        val_share: float = 0.1,
    ):
        self.path, self.split = Path(path), split
        self._wording = _Wording(f"image folder {path}", recipe, caption_format, detailed_format)
        if split not in ("train", "val", "all"):
            raise UserError(f"image folder {path} has no split {split!r}: choose train, val or all")
        try:
            metadata = (self.path / "metadata.jsonl").read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.path / 'metadata.jsonl'} cannot be read: set path to an image folder"
            ) from error
        self._records = []
        for number, line in enumerate(metadata.decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            record = self._parse(line, number)
            if split == "all" or (_share(record["file_name"]) < val_share) == (split == "val"):
                self._wording.check(record)
                self._records.append(record)
        if not self._records:
            raise UserError(
                f"the split {split!r} of image folder {path} is empty: add pictures or change the split"
            )
        digest = hashlib.blake2b(metadata, digest_size=8).hexdigest()
        self.fingerprint = f"{digest}/{split}/{val_share}/{recipe}/{caption_format}/{detailed_format}"

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            inside = not Path(os.path.normpath(record["file_name"])).parts[0] == ".."
            if inside and not os.path.isabs(record["file_name"]):
                return record
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        raise UserError(
            f"{self.path / 'metadata.jsonl'} line {number} is not a JSON object with a file_name inside the "
            "folder: mend or remove it"
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Example:
        record = self._records[int(i)]
        image = functools.partial(load_image, str(self.path / record["file_name"]))
        return self._wording.example(image, record, f"{self.path.name}/{record['file_name']}")


def _share(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64
