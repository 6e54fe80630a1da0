"""What training sees, as an HTML page: rows with their segments, their pictures, and which tokens are targets."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from pisces_jax.data.packing.items import Items, Made
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.tokenizers import Tokenizer

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
# A piece of a segment is a text, the name of a special token, a picture, cached features, or a gap without a picture.
_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><title>{{ title }}</title><style>
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
</style></head><body>
{%- macro name(source) %}<b style='color:{{ source.colour }}'>{{ source.name }}</b>{% endmacro %}
{%- macro show(piece) %}
{%- if piece.text is defined %}{{ piece.text }}
{%- elif piece.special is defined %}<code>{{ piece.special }}</code>
{%- elif piece.png %}<img class={{ piece.role }} alt='{{ piece.role }}' src='data:image/png;base64,{{ piece.png }}'>
{%- elif piece.role %}<span class='box {{ piece.role }}'>cached features</span>
{%- else %}<span class=broken>no picture</span>
{%- endif %}{% endmacro %}
<h1>{{ title }}</h1><p>Green is learned; a picture to read has a grey frame, one to draw a yellow one. The sources are
{% for source in sources %}{{ name(source) }}{{ ", " if not loop.last else "" }}{% endfor %}.</p>
{% for item in items %}<h2>{{ item.heading }}</h2>
{% for row in item.rows %}<div class=row><div class=bar>
{%- for segment in row %}<span style='width:{{ segment.width }};background:{{ segment.source.colour }}'></span>
{%- endfor %}</div>
{% for segment in row %}<div class=segment style='border-color:{{ segment.source.colour }}'>
<small>{{ name(segment.source) }}, {{ segment.about }}</small>
{%- for piece in segment.pieces %} {% if piece.learned %}<mark>{{ show(piece) }}</mark>{% else %}{{ show(piece) }}
{%- endif %}{% endfor %}</div>
{% endfor %}</div>
{% endfor %}{% for broken in item.broken %}<p class=broken>masked: {{ broken }}</p>
{% endfor %}{% endfor %}</body></html>
"""

Segment = dict[str, Any]


def page(items: Items, numbers: Sequence[int], title: str) -> str:
    """One HTML file, pictures included, of the groups or pairs with these numbers."""
    environment = jinja2.Environment(autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined)
    sources = [dict(name=name, colour=_COLOURS[s % len(_COLOURS)]) for s, name in enumerate(items.names)]
    shown = []
    for i in numbers:
        made = items.make(i)
        heading, rows = _pair(items, sources, i, made) if isinstance(items, Pairs) else _group(items, sources, i, made)
        shown.append(dict(heading=heading, rows=rows, broken=[broken.message for broken in made.broken]))
    return environment.from_string(_PAGE).render(title=title, sources=sources, items=shown)


def _printable(value: Any) -> Any:
    """What came out of a file may hold anything; jinja2 escapes it, and control characters are replaced here."""
    if type(value) is not str:
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)


def _group(items: Items, sources: Sequence[Any], i: int, made: Made) -> tuple[str, list[list[Segment]]]:
    group, layout = made.item, items.layout
    epoch, number = items.locate(i)
    shares = [f"{(group['segment_ids'] > 0).mean():.0%} of the tokens"]
    for role, slots in ("read", layout.read_slots), ("draw", layout.draw_slots):
        if slots:
            shares.append(f"{int(group[f'{role}_valid'].sum())} of {slots} pictures to {role}")
    rows: list[list[Segment]] = []
    for row in range(layout.rows):
        pictures = {}
        for role in ("read", "draw"):
            for slot in np.flatnonzero(group[f"{role}_valid"] & (group[f"{role}_row"] == row)):
                shown = group[f"{role}_images"][slot] if f"{role}_images" in group else None
                pictures[int(group[f"{role}_start"][slot])] = _picture(role, shown)
        rows.append([])
        ids = group["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            span = np.flatnonzero(ids == segment)
            tokens, loss_mask = group["tokens"][row, span], group["loss_mask"][row, span]
            here = {start - int(span[0]): picture for start, picture in pictures.items()}
            rows[-1].append({
                "source": sources[group["source"][row, span[0]]],
                "width": f"{len(span) / layout.length:.2%}",
                "about": f"{len(span)} tokens from {span[0]}",
                "pieces": _pieces(items.tokenizer, tokens, loss_mask, here),
            })  # fmt: skip
    return f"epoch {epoch}, group {number}: {', '.join(shares)}", rows


def _pair(items: Pairs, sources: Sequence[Any], i: int, made: Made) -> tuple[str, list[list[Segment]]]:
    pair = made.item
    epoch, number = items.locate(i)
    heading = f"epoch {epoch}, pair {number}"
    if not pair["valid"]:
        return heading, []
    ids = pair["tokens"][pair["text_mask"]]
    pieces = [_picture("read", pair.get("image")), *_pieces(items.tokenizer, ids, np.zeros(len(ids), bool), {})]
    source = sources[items.member(i)[0]]
    return heading, [[dict(source=source, width="100%", about=f"{len(ids)} tokens", pieces=pieces)]]


def _pieces(
    tokenizer: Tokenizer,
    tokens: Int32[np.ndarray, "L"],
    loss_mask: Bool[np.ndarray, "L"],
    pictures: Mapping[int, Segment],
) -> Iterator[Segment]:
    """The tokens as texts, special ones by name, and a picture where its vectors begin."""
    special = {
        tokenizer.bos: "bos", tokenizer.eos: "eos", tokenizer.begin_image: "[IMG]", tokenizer.end_image: "[/IMG]",
        tokenizer.pad: "pad",
    }  # fmt: skip
    run = list[int]()
    pairs = list(zip(tokens.tolist(), loss_mask.tolist(), strict=True))
    for t, (token, learned) in enumerate(pairs):
        if token == tokenizer.image:
            if t in pictures:
                yield pictures[t]
            elif t == 0 or tokens[t - 1] != tokenizer.image:
                yield dict(learned=False, png=None, role=None)
            continue
        if token in special:
            yield dict(learned=learned, special=special[token])
            continue
        run.append(token)
        following = pairs[t + 1] if t + 1 < len(pairs) else (tokenizer.image, learned)
        if following[0] in special or following[0] == tokenizer.image or following[1] != learned:
            yield dict(learned=learned, text=tokenizer.decode(run))
            run = []


def _picture(role: str, array: UInt8[np.ndarray, "S S 3"] | None) -> Segment:
    """`array` is None for cached features."""
    if array is None:
        return dict(learned=False, png=None, role=role)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return dict(learned=False, png=base64.b64encode(file.getvalue()).decode(), role=role)
