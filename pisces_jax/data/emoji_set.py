"""Makes the emoji set of `configs/emoji.py` from public npm packages: pictures in seven styles, names, groups, tags.

    npm pack emojibase-data @iconify-json/noto @iconify-json/noto-v1 @iconify-json/twemoji @iconify-json/openmoji \\
        @iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat @iconify-json/emojione
    pip install resvg-py
    python -m pisces_jax.data.emoji_set --packages=. --out=../shared/data/emoji

Emoji with skin tones are left out. Every picture is drawn from its SVG at 128 pixels, laid over white, and halved by
the means of 2 × 2 pixels. The splits follow from hashes: `new_names` has all pictures of about one name in 25, `val`
about one picture in 14 of the other names, as long as two of the name stay in `train`. Licences: Noto Apache-2.0,
Twemoji and EmojiOne 2 CC BY 4.0, OpenMoji CC BY-SA 4.0, Fluent and emojibase MIT.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from pisces_jax.data.example import identity
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.utils.files import replacing

NAMES = "emojibase-data"
STYLES = {
    "@iconify-json/noto": "noto",
    "@iconify-json/noto-v1": "old noto",
    "@iconify-json/twemoji": "twemoji",
    "@iconify-json/openmoji": "openmoji",
    "@iconify-json/fluent-emoji": "fluent",
    "@iconify-json/fluent-emoji-flat": "flat fluent",
    "@iconify-json/emojione": "emojione",
}
SIZE = 64
PER_SHARD = 1000
NEW_NAMES, VAL = 0.04, 0.07  # shares of names, and of the pictures of other names
FEWEST_STYLES = 5  # of a name in new_names
STAY = 2  # pictures of a name of `val` that stay in `train`

Render = Callable[[str, int], bytes]
"""From an SVG and a side in pixels to a PNG."""


class Emoji(NamedTuple):
    """A picture to draw, and the fields of its example."""

    svg: str
    fields: dict[str, str]


def main() -> None:
    parser = cli.Parser("data.emoji_set", "Makes the emoji set from npm packages.", ["--packages=. --out=data/emoji"])
    parser.add_argument("--packages", type=cli.path, required=True, metavar="DIR", help="files of `npm pack`")
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="where the shards go")
    flags = parser.parse()
    cli.check_output(flags.out, "--out", folder=True)
    counts = make(sorted(flags.packages.glob("*.tgz")), flags.out, resvg())
    cli.say(", ".join(f"{split}: {count} pictures" for split, count in counts.items()), f"in {flags.out}")


def resvg() -> Render:
    """The renderer.

    Raises:
        UserError: it is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("the package resvg-py draws the pictures and is missing: pip install resvg-py") from error
    return lambda svg, size: bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))


def make(packages: Sequence[Path], out: Path, render: Render) -> dict[str, int]:
    """Writes the shards `SPLIT-00000.tar`, … and returns the number of pictures of each split.

    Raises:
        UserError: a package is missing or has another form.
    """
    found = dict(_package(path) for path in packages)
    missing = [name for name in (NAMES, *STYLES) if name not in found]
    if missing:
        raise UserError(f"--packages has no {', '.join(missing)}: fetch them with npm pack")
    splits = split(list(emoji(found)))
    for name, members in splits.items():
        for shard in range(-(-len(members) // PER_SHARD)):
            some = members[shard * PER_SHARD : (shard + 1) * PER_SHARD]
            with replacing(out / f"{name}-{shard:05d}.tar") as path, tarfile.open(path, "w") as archive:
                for i, one in enumerate(tqdm(some, desc=f"{name} {shard}", leave=False, delay=3.0)):
                    text = f"{one.fields['label']}, {one.fields['style']}"
                    for suffix, data in (
                        ("png", picture(one.svg, render)),
                        ("txt", text.encode()),
                        ("json", json.dumps(one.fields, ensure_ascii=False).encode()),
                    ):
                        member = tarfile.TarInfo(f"{name}_{shard * PER_SHARD + i:06d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    return {name: len(members) for name, members in splits.items()}


def _package(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of an npm package, and its JSON files by path."""
    try:
        with tarfile.open(path) as archive:
            wanted = ("package.json", "icons.json", "chars.json", "en/data.json", "en/messages.json")
            members = {m.name.partition("/")[2]: m for m in archive if m.isfile()}
            files = {name: archive.extractfile(members[name]) for name in wanted if name in members}
            read = {name: json.load(file) for name, file in files.items() if file}
        return read["package.json"]["name"], read
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no npm package ({error!r}): fetch it again with npm pack") from error


def emoji(packages: Mapping[str, Mapping[str, Any]]) -> Iterator[Emoji]:
    """All emoji with a group, in the styles that have them.

    Raises:
        UserError: a package has another form.
    """
    try:
        messages = packages[NAMES]["en/messages.json"]
        groups, subgroups = (
            {one["order"]: one["message"] for one in messages[kind]} for kind in ("groups", "subgroups")
        )
        parts = next((one["order"] for one in messages["groups"] if one["key"] == "component"), None)
        names = _names(packages)
        own = {package: {_code(p): [name] for p, name in packages[package]["chars.json"].items()} for package in STYLES}
        for entry in packages[NAMES]["en/data.json"]:
            if entry.get("group") in (None, parts):
                continue  # parts of others, such as regional indicators, hair and skin tones
            code = _code(entry["hexcode"])
            about = dict(
                tags=", ".join(sorted(entry.get("tags", [entry["label"]]))),
                group=groups[entry["group"]], subgroup=subgroups[entry["subgroup"]], code=code,
            )  # fmt: skip
            slug = re.sub("[^a-z0-9]+", "-", entry["label"].lower()).strip("-")
            for package, style in STYLES.items():
                called = own[package].get(code) or [*names.get(code, []), slug]
                if svg := _svg(packages[package]["icons.json"], called):
                    yield Emoji(svg, {"label": entry["label"], "style": style, **about})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a package has another form than is known ({error!r}): fetch an older version") from error


def _names(packages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What the styles call each code point: those that list no code points use the same names."""
    found: dict[str, list[str]] = {}
    for package in STYLES:
        for code, name in packages[package]["chars.json"].items():
            names = found.setdefault(_code(code), [])
            names += [name] if name not in names else []
    return found


def _svg(whole: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The SVG of the first of `names` that a style has, if any."""
    for name in names:
        icon = whole["icons"].get(name) or whole["icons"].get(whole.get("aliases", {}).get(name, {}).get("parent"))
        if icon:
            left, top, width, height = (
                icon.get(key, whole.get(key, default))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
    return None


def _code(points: str) -> str:
    """Code points as one spelling, without the mark that asks for colours."""
    return "-".join(point for point in points.lower().split("-") if point != "fe0f")


def picture(svg: str, render: Render) -> bytes:
    """The PNG of an SVG on white, of `SIZE` pixels a side."""
    drawn = Image.open(io.BytesIO(render(svg, 2 * SIZE))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, drawn).convert("RGB").resize((2 * SIZE, 2 * SIZE)))
    out = io.BytesIO()
    Image.fromarray(halved(pixels)).save(out, "PNG", optimize=True)
    return out.getvalue()


def halved(pixels: UInt8[np.ndarray, "2*S 2*S 3"]) -> UInt8[np.ndarray, "S S 3"]:
    """The means of 2 × 2 pixels, rounded."""
    size = len(pixels) // 2
    means = pixels.reshape(size, 2, size, 2, 3).astype(np.uint16).sum((1, 3), np.uint16)
    return ((means + 2) // 4).astype(np.uint8)


def split(members: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """The members of each split, in an order by a hash."""
    splits: dict[str, list[Emoji]] = {"train": [], "val": [], "new_names": []}
    names: dict[str, list[Emoji]] = {}
    for one in members:
        names.setdefault(one.fields["label"], []).append(one)
    for label, own in names.items():
        if len(own) >= FEWEST_STYLES and _share("name", label) < NEW_NAMES:
            splits["new_names"] += own
            continue
        left = len(own)
        for one in own:
            held_out = left > STAY and _share("picture", label, one.fields["style"]) < VAL
            splits["val" if held_out else "train"].append(one)
            left -= held_out
    for some in splits.values():
        some.sort(key=lambda one: _share("order", one.fields["label"], one.fields["style"]))
    return splits


def _share(*words: str) -> float:
    """A number from 0 to below 1 that depends on the words alone."""
    return int(identity("emoji", *words)[0]) / 2**32


if __name__ == "__main__":
    run_command(main)
