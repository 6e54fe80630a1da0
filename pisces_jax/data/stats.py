"""Numbers of a config's sources: how many examples, how long, how large their pictures, what is broken."""

import collections
import time
from typing import Any

import numpy as np

from pisces_jax.data.example import Picture, reason_of
from pisces_jax.data.packing.items import Items
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.packing.lengths import Lengths
from pisces_jax.data.packing.mixture import shuffled
from pisces_jax.utils.errors import UserError


def of_items(items: Items, pictures: int) -> dict[str, Any]:
    """All that `python -m pisces_jax.data stats` prints; `pictures` of each source are decoded, chosen at random."""
    sources = {
        entry.name: {
            **of_lengths(lengths),
            "examples_per_epoch": count,
            "pictures_seen": of_pictures(entry, pictures),
            "left_out": items.left_out[entry.name],
        }
        for entry, lengths, count in zip(items.entries, items.lengths, items.counts, strict=True)
    }
    return {"sources": sources, "examples_per_epoch": sum(items.counts), **items.summary()}


def of_lengths(lengths: Lengths) -> dict[str, Any]:
    """`tokens` is [least, median, mean, 95th percentile, most] over the readable examples."""
    known = lengths.tokens[lengths.tokens >= 0]
    spread = [float(f(known)) for f in (np.min, np.median, np.mean, lambda x: np.percentile(x, 95), np.max)]
    return {
        "examples": len(lengths.tokens),
        "tokens": [round(value, 1) for value in spread] if len(known) else [],
        "pictures_read": int(lengths.reads.sum()),
        "pictures_drawn": int(lengths.draws.sum()),
        "broken": dict(lengths.reasons),
        "broken_first": list(lengths.messages[:5]),
    }


def of_pictures(entry: Entry, n: int) -> dict[str, Any]:
    """Sides of the first pictures of up to `n` examples, the time to decode them, and what cannot be decoded."""
    chosen = shuffled(np.arange(min(n, len(entry.source))), len(entry.source), "stats", entry.name)
    sizes, reasons, seconds = [], collections.Counter[str](), 0.0
    for i in chosen.tolist():
        try:
            picture = next((p for p in entry.source[i].parts if isinstance(p, Picture)), None)
            if picture is None:
                continue
            began = time.perf_counter()
            sizes.append(picture.array().shape[:2])
            seconds += time.perf_counter() - began
        except UserError as error:
            reasons[reason_of(error)] += 1
    found: dict[str, Any] = {"decoded": len(sizes), "broken": dict(reasons)}
    for name, sides in zip(("short_side", "long_side"), np.sort(np.array(sizes), axis=-1).T, strict=False):
        found[name] = [int(sides.min()), int(np.median(sides)), int(sides.max())]
    if sizes:
        found["milliseconds_each"] = round(1000 * seconds / len(sizes), 3)
    return found


def of_shards(path: str, index_dir: str | None, workers: int | None) -> list[str]:
    """Indexes tar shards where it is due (`formats.webdataset`); lines that say what they hold."""
    from pisces_jax.data import storage
    from pisces_jax.data.formats.webdataset import PROBLEMS, WebDataset

    shards = WebDataset(path, index_dir=index_dir, index_workers=workers)
    lines = [f"{len(shards)} samples in {len(shards.paths)} shards"]
    counts = zip(PROBLEMS[1:], shards.problems()[1:], strict=True)
    lines += [f"  {problem}: {n}" for problem, n in counts if n]
    if index_dir is None and any(map(storage.is_remote, shards.paths)):
        lines.append(
            "the indices are in this host's cache, which other hosts do not see: give --index_dir a folder that all "
            "share, and set the same index_dir in the source"
        )
    return lines


def table(stats: dict[str, Any]) -> str:
    """The same numbers as lines of text."""
    lines = []
    for name, s in stats["sources"].items():
        lines.append(f"{name}: {s['examples']} examples, {s['examples_per_epoch']} per epoch")
        if s["tokens"]:
            least, median, mean, most95, most = s["tokens"]
            lines.append(f"  tokens     {least:g} to {most:g}, median {median:g}, mean {mean:g}, 95 % up to {most95:g}")
        p = s["pictures_seen"]
        if p["decoded"]:
            lines.append(
                f"  pictures   short side {p['short_side'][0]} to {p['short_side'][2]}, long side "
                f"{p['long_side'][0]} to {p['long_side'][2]}; {p['milliseconds_each']} ms to decode one "
                f"({p['decoded']} decoded)"
            )
        lines.append(f"  left out   {', '.join(f'{reason} {n}' for reason, n in s['left_out'].items())}")
        for label, reasons in ("texts", s["broken"]), ("pictures", p["broken"]):
            lines += [f"  broken {label}: {reason}: {n}" for reason, n in reasons.items()]
        lines += [f"    {message}" for message in s["broken_first"]]
    if "fill" in stats:
        fill = stats["fill"]
        lines.append(
            f"packing: {stats['groups_per_epoch']} groups per epoch, which use {fill['tokens']:.1%} of the tokens, "
            f"{fill['read_slots']:.1%} of the slots to read, {fill['draw_slots']:.1%} of the slots to draw"
        )
    return "\n".join(lines)
