"""The kinds of sources that a config names, and how its words become one."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pisces_jax.data.jsonfiles import ImageFolder, JsonRecords
from pisces_jax.data.layout import Entry, Source
from pisces_jax.data.parquet import Parquet
from pisces_jax.data.prepared import ArrayRecords, Tfds
from pisces_jax.data.recipes import Recipe
from pisces_jax.data.records import Examples, Records
from pisces_jax.data.shapes import ShapesSource
from pisces_jax.data.webdataset import WebDataset
from pisces_jax.errors import UserError

READERS: dict[str, Callable[..., Records]] = {
    "tfds": Tfds,
    "array_record": ArrayRecords,
    "webdataset": WebDataset,
    "json": JsonRecords,
    "parquet": Parquet,
}
SOURCES: dict[str, Callable[..., Source]] = {"shapes": ShapesSource, "image_folder": ImageFolder}
KINDS = (*SOURCES, *READERS)


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
    reader = inspect.signature(READERS.get(kind) or SOURCES[kind]).parameters
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
            return Entry(name, weight, SOURCES[kind](**given))
        recipe = Recipe(**{key: given.pop(key) for key in list(given) if key in ways})
        if kind in SOURCES:
            return Entry(name, weight, SOURCES[kind](recipe=recipe, **given))
        chosen = {key: given.pop(key) for key in split if key in given}
        return Entry(name, weight, Examples(READERS[kind](**given), recipe, **chosen))
    except UserError as error:
        raise UserError(f"source {name}: {error}") from error
