"""What training sees, as a page to look at: rows with their segments, pictures, and what is learned."""

import base64
import html
import io
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import Made, PackedGroups
from pisces_jax.data.tokenizers import Tokenizer

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
h2 { font-size: 1.1em; margin: 2em 0 .3em }
.bar { display: flex; height: .6em; background: #eee; border-radius: .3em; overflow: hidden; margin: .3em 0 }
.bar span { border-right: 1px solid #fff }
.row { margin: .8em 0 1.4em }
.segment { border-left: .35em solid; padding: .1em .7em; margin: .45em 0 }
.segment small { color: #777; display: block }
mark { background: #c9efcb; border-radius: .2em; padding: 0 .1em }
code { color: #999; font-size: .85em }
mark code { color: #2a6b2f }
img { height: 6em; max-width: 12em; image-rendering: pixelated; vertical-align: middle; margin: .1em .3em;
      border: 2px solid #999; border-radius: .2em }
.box { border: 2px solid #999; border-radius: .2em; padding: 1em .5em; margin: .1em .3em }
img.draw, .box.draw { border-color: #d08700 } .broken { color: #b00020 }
"""
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")


def page(items: PackedGroups | Pairs, numbers: Sequence[int], title: str) -> str:
    """One HTML file, pictures included, of the groups or pairs of these numbers."""
    about = (
        "Green is learned; a picture to read has a grey frame, one to draw a yellow one. "
        f"The sources are {', '.join(_name(items, s) for s in range(len(items.entries)))}."
    )
    body = [f"<h1>{_escape(title)}</h1><p>{about}</p>"]
    for i in numbers:
        made = items.make(i)
        body += _group(items, i, made) if isinstance(items, PackedGroups) else _pair(items, i, made)
        body += [f"<p class=broken>masked: {_escape(broken.message)}</p>" for broken in made.broken]
    head = f"<meta charset=utf-8><title>{_escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _group(groups: PackedGroups, i: int, made: Made) -> Iterator[str]:
    group, layout = made.item, groups.layout
    epoch, number = groups.locate(i)
    shares = [f"{(group['segment_ids'] > 0).mean():.0%} of the tokens"]
    for role, slots in ("read", layout.read_slots), ("draw", layout.draw_slots):
        if slots:
            shares.append(f"{int(group[f'{role}_valid'].sum())} of {slots} pictures to {role}")
    yield f"<h2>epoch {epoch}, group {number}: {', '.join(shares)}</h2>"
    for row in range(layout.rows):
        ids = group["segment_ids"][row]
        spans = [np.flatnonzero(ids == segment) for segment in range(1, ids.max() + 1)]
        sources = [int(group["source"][row, span[0]]) for span in spans]
        bar = "".join(
            f"<span style='width:{len(span) / layout.length:.2%};background:{_colour(s)}'></span>"
            for span, s in zip(spans, sources, strict=True)
        )
        yield f"<div class=row><div class=bar>{bar}</div>"
        for span, s in zip(spans, sources, strict=True):
            pictures = {}
            for role in ("read", "draw"):
                for slot in np.flatnonzero(group[f"{role}_valid"] & (group[f"{role}_row"] == row)):
                    shown = group[f"{role}_images"][slot] if f"{role}_images" in group else None
                    pictures[int(group[f"{role}_start"][slot])] = role, shown
            here = {start - span[0]: picture for start, picture in pictures.items() if span[0] <= start <= span[-1]}
            words = _sequence(groups.tokenizer, group["tokens"][row, span], group["loss_mask"][row, span], here)
            yield _segment(groups, s, f"{len(span)} tokens from {span[0]}", words)
        yield "</div>"


def _pair(pairs: Pairs, i: int, made: Made) -> Iterator[str]:
    pair = made.item
    epoch, place = divmod(i, pairs.per_epoch)
    (source,), _ = pairs.mixture.at(epoch, np.array([place]))
    yield f"<h2>epoch {epoch}, pair {place}</h2>"
    if pair["valid"]:
        ids = pair["tokens"][pair["text_mask"]]
        words = _image("read", pair.get("image")) + _sequence(pairs.tokenizer, ids, np.zeros(len(ids), bool), {})
        yield _segment(pairs, int(source), f"{len(ids)} tokens", words)


def _segment(items: PackedGroups | Pairs, source: int, about: str, words: str) -> str:
    small = f"<small>{_name(items, source)}, {about}</small>"
    return f"<div class=segment style='border-color:{_colour(source)}'>{small}{words}</div>"


def _sequence(
    tokenizer: Tokenizer,
    tokens: Int32[np.ndarray, "L"],
    loss_mask: Bool[np.ndarray, "L"],
    pictures: dict[int, tuple[str, np.ndarray | None]],
) -> str:
    """The tokens as text, special ones by name, a picture (None: its cached features) where its vectors begin."""
    special = {
        tokenizer.bos: "bos", tokenizer.eos: "eos", tokenizer.begin_image: "[IMG]", tokenizer.end_image: "[/IMG]",
        tokenizer.pad: "pad",
    }  # fmt: skip
    shown, run = [], list[int]()

    def end(learned: bool) -> None:
        if run:
            shown.append(_marked(_escape(tokenizer.decode(run)), learned))
            run.clear()

    for t, (token, learned) in enumerate(zip(tokens.tolist(), loss_mask.tolist(), strict=True)):
        if t and (learned != bool(loss_mask[t - 1])):
            end(bool(loss_mask[t - 1]))
        if token == tokenizer.image:
            end(learned)
            if t in pictures:
                shown.append(_image(*pictures[t]))
            elif t == 0 or tokens[t - 1] != tokenizer.image:
                shown.append("<span class=broken>no picture</span>")
        elif token in special:
            end(learned)
            shown.append(_marked(f"<code>{special[token]}</code>", learned))
        else:
            run.append(token)
    end(bool(len(loss_mask) and loss_mask[-1]))
    return " ".join(shown)


def _marked(words: str, learned: bool) -> str:
    return f"<mark>{words}</mark>" if learned else words


def _image(role: str, array: UInt8[np.ndarray, "S S 3"] | None) -> str:
    if array is None:
        return f"<span class='box {role}'>cached features</span>"
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return f"<img class={role} alt='{role}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _name(items: PackedGroups | Pairs, source: int) -> str:
    return f"<b style='color:{_colour(source)}'>{_escape(items.entries[source].name)}</b>"


def _colour(source: int) -> str:
    return _COLOURS[source % len(_COLOURS)]


def _escape(words: str) -> str:
    """What came out of a file may hold anything; the page shows it and runs none of it."""
    return html.escape("".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in words))
