"""The kinds of sources that a config can name, and how its keys become one."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pisces_jax.data.formats.records import Examples
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.recipes import Recipe
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import expand_home

# Arguments of sources that are paths, or lists of them.
PATHS = ("path", "image_root", "data_dir", "index_dir")

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
    "image_folder": "pisces_jax.data.formats.image_folder:ImageFolder",
}


def make_source(spec: Mapping[str, Any]) -> Entry:
    """One source of a mixture, from a config's `kind`, `name`, `weight` (1) and the arguments of its class and recipe.

    `kind` is one of `SOURCES` or `READERS`; all but "shapes" take the fields of `Recipe`. Readers also take `split` and
    `val_share` (`Examples`), unless they have a `split` of their own. `name` is how reports call the source, by default
    its kind; the keys of examples in plain files begin with it.

    Raises:
        UserError: an unknown kind or argument, or as the class and the recipe themselves do.
    """
    given = dict(spec)
    kind = given.pop("kind", None)
    kinds = SOURCES | READERS
    if kind not in kinds:
        raise UserError(f"unknown kind of source {kind!r}: choose one of {', '.join(kinds)}")
    name, weight = given.pop("name", kind), given.pop("weight", 1.0)
    try:
        weight = float(weight)
    except (TypeError, ValueError) as error:
        raise UserError(f"source {name}: weight={weight!r} is not a number: give one such as 1.0") from error
    module, _, class_name = kinds[kind].partition(":")
    made = getattr(importlib.import_module(module), class_name)
    own = dict(inspect.signature(made).parameters)
    of_recipe = inspect.signature(Recipe).parameters if kind in READERS or "recipe" in own else {}
    of_split = {} if kind in SOURCES or "split" in own else inspect.signature(Examples).parameters
    of_split = {key: of_split[key] for key in ("split", "val_share") if key in of_split}
    known = own | dict(of_recipe) | of_split
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1, 0.0)[0]
            raise UserError(
                f"source {name}: {kind} takes no {key!r} (did you mean {near!r}?): choose among {', '.join(known)}"
            )
    for key, parameter in known.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise UserError(f"source {name}: {kind} needs {key!r}: set it")
    if isinstance(given.get("images"), str):  # one name, which would be taken letter by letter
        given["images"] = (given["images"],)
    if "name" in own:
        given["name"] = name
    for key in PATHS:
        if isinstance(given.get(key), str):
            given[key] = expand_home(given[key])
        elif isinstance(given.get(key), (list, tuple)):
            given[key] = [expand_home(one) for one in given[key]]

    def take(keys: Mapping[str, Any]) -> dict[str, Any]:
        return {key: given.pop(key) for key in list(given) if key in keys}

    try:
        if not of_recipe:
            return Entry(name, weight, made(**given))
        recipe = Recipe(**take(of_recipe))
        if kind in SOURCES:
            return Entry(name, weight, made(recipe=recipe, **given))
        chosen = take(of_split)
        return Entry(name, weight, Examples(made(**given), recipe, **chosen))
    except UserError as error:
        raise UserError(f"source {name}: {error}") from error
