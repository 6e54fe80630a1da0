"""Numbers of a config's sources: how many examples, how long, how large their pictures, what is broken."""

import collections
import time
from typing import Any

import numpy as np

from pisces_jax.data.example import Picture, reason_of
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.packing.lengths import Lengths
from pisces_jax.data.packing.mixture import shuffled
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.utils.errors import UserError


def of_items(items: PackedGroups | Pairs, pictures: int) -> dict[str, Any]:
    """All that `python -m pisces_jax.data stats` prints; `pictures` of each source are decoded, chosen at random."""
    counts = items.counts if isinstance(items, PackedGroups) else items.mixture.counts
    sources = {}
    for entry, length, count in zip(items.entries, items.lengths, counts, strict=True):
        sources[entry.name] = {
            **of_lengths(length),
            "examples_per_epoch": count,
            "pictures_seen": of_pictures(entry, pictures),
        }
        left_out = items.left_out[entry.name]
        sources[entry.name]["left_out"] = left_out._asdict() if isinstance(left_out, tuple) else left_out
    whole: dict[str, Any] = {"sources": sources, "examples_per_epoch": sum(counts)}
    if isinstance(items, PackedGroups):
        whole["groups_per_epoch"] = items.per_epoch
        whole["fill"] = {name: round(share, 4) for name, share in items.fill()._asdict().items()}
    return whole


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
    """Sides of up to `n` pictures (one an example), how long decoding took, and what cannot be decoded."""
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
    if sizes:
        short, long = np.sort(np.array(sizes), axis=1).T
        found["short_side"] = [int(short.min()), int(np.median(short)), int(short.max())]
        found["long_side"] = [int(long.min()), int(np.median(long)), int(long.max())]
        found["milliseconds_each"] = round(1000 * seconds / len(sizes), 3)
    return found


def table(stats: dict[str, Any]) -> str:
    """The same to read."""
    lines = []
    for name, s in stats["sources"].items():
        lines.append(f"{name}: {s['examples']} examples, {s['examples_per_epoch']} of them an epoch")
        if s["tokens"]:
            least, median, mean, most95, most = s["tokens"]
            lines.append(f"  tokens     {least:g} to {most:g}, median {median:g}, mean {mean:g}, 95 % up to {most95:g}")
        p = s["pictures_seen"]
        if p["decoded"]:
            lines.append(
                f"  pictures   short side {p['short_side'][0]} to {p['short_side'][2]}, long side "
                f"{p['long_side'][0]} to {p['long_side'][2]}; {p['milliseconds_each']} ms to decode one "
                f"({p['decoded']} looked at)"
            )
        left = s["left_out"]
        shown = ", ".join(f"{reason} {n}" for reason, n in left.items()) if isinstance(left, dict) else left
        lines.append(f"  left out   {shown}")
        for label, reasons in ("texts", s["broken"]), ("pictures", p["broken"]):
            lines += [f"  broken {label}: {reason}: {n}" for reason, n in reasons.items()]
        lines += [f"    {message}" for message in s["broken_first"]]
    if "fill" in stats:
        fill = stats["fill"]
        lines.append(
            f"packing: {stats['groups_per_epoch']} groups an epoch; in use {fill['tokens']:.1%} of the tokens, "
            f"{fill['read_slots']:.1%} of the slots to read, {fill['draw_slots']:.1%} of the slots to draw"
        )
    return "\n".join(lines)
