"""The kinds of sources that a config names, and how its words become one."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pisces_jax.data.formats.records import Examples
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.recipes import Recipe
from pisces_jax.utils.errors import UserError

# Kind -> "module:class". A module is imported when a config names its kind: TensorFlow Datasets and Arrow take a second
# each. A class in READERS gives records (`formats.records.Records`), which a recipe turns into examples; one in SOURCES
# gives examples itself (`packing.layout.Source`).
READERS = {
    "tfds": "pisces_jax.data.formats.array_records:Tfds",
    "array_record": "pisces_jax.data.formats.array_records:ArrayRecords",
    "webdataset": "pisces_jax.data.formats.webdataset:WebDataset",
    "json": "pisces_jax.data.formats.json_files:JsonRecords",
    "parquet": "pisces_jax.data.formats.parquet:Parquet",
}
SOURCES = {
    "shapes": "pisces_jax.shapes_world.source:ShapesSource",
    "image_folder": "pisces_jax.data.formats.json_files:ImageFolder",
}
KINDS = (*SOURCES, *READERS)


def _class_of(kind: str) -> Any:
    module, _, name = {**READERS, **SOURCES}[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def make_source(spec: Mapping[str, Any]) -> Entry:
    """A mixture's entry from a config's: `kind`, `name`, `weight` (1), and the arguments of its reader and recipe.

    Kinds are those of `KINDS`; all but "shapes" take the fields of `Recipe`, and readers also `split` and `val_share`
    (`Examples`), unless they have a `split` of their own. `name` is what reports call it, by default its kind, and what
    the keys of examples in plain files begin with.

    Raises:
        UserError: an unknown kind or argument, or as the reader and the recipe themselves do.
    """
    given = dict(spec)
    kind = given.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"no kind of source {kind!r}: choose one of {', '.join(KINDS)}")
    name, weight = given.pop("name", kind), given.pop("weight", 1.0)
    try:
        weight = float(weight)
    except (TypeError, ValueError) as error:
        raise UserError(f"source {name}: weight={weight!r} is no number: give one such as 1.0") from error
    made = _class_of(kind)
    reader = inspect.signature(made).parameters
    takes_recipe = kind in READERS or "recipe" in reader
    ways: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Recipe) if takes_recipe}
    splits = inspect.signature(Examples).parameters
    split = {n: splits[n].default for n in ("split", "val_share") if kind in READERS and "split" not in reader}
    known = {n: p.default for n, p in reader.items() if n != "recipe"} | ways | split
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1, 0.0)[0]
            raise UserError(
                f"source {name}: {kind} takes no {key!r} (did you mean {near!r}?): choose among {', '.join(known)}"
            )
    for key, default in known.items():
        if key not in given and default in (inspect.Parameter.empty, dataclasses.MISSING):
            raise UserError(f"source {name}: {kind} needs {key!r}: set it")
    if isinstance(given.get("images"), str):  # one name, which would be taken letter by letter
        given["images"] = (given["images"],)
    if "name" in reader:
        given["name"] = name
    try:
        if not takes_recipe:
            return Entry(name, weight, made(**given))
        recipe = Recipe(**{key: given.pop(key) for key in list(given) if key in ways})
        if kind in SOURCES:
            return Entry(name, weight, made(recipe=recipe, **given))
        chosen = {key: given.pop(key) for key in split if key in given}
        return Entry(name, weight, Examples(made(**given), recipe, **chosen))
    except UserError as error:
        raise UserError(f"source {name}: {error}") from error
