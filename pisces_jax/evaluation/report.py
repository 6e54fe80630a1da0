"""What the demo leaves behind: a sheet of samples, a summary for the terminal, and a report in one HTML file."""

import base64
import html
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.charts import training_charts
from pisces_jax.evaluation.grids import Cell, Row, labelled_grid, png, side_by_side
from pisces_jax.evaluation.suite import Results, number
from pisces_jax.shapes_world.drawing import Judged, true_picture
from pisces_jax.shapes_world.reading import Answered, plain
from pisces_jax.shapes_world.source import TAGS

_WAYS = {"described": "described, then drawn", "direct": "drawn at once", "held_out": "held-out combinations"}
_MOMENTS = 4  # of training, whose samples are shown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.7em; } h2 { margin-top: 2em; border-bottom: 2px solid #ddd; } h3 { margin: 1.2em 0 .4em; }
table { border-collapse: collapse; margin: .6em 2em .6em 0; display: inline-table; vertical-align: top; }
th, td { padding: .15em .8em; border-bottom: 1px solid #e4e4e4; text-align: left; }
td.right { background: #e2f3e7; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; display: block; max-width: 100%; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; }
.card { width: 172px; font-size: 12px; line-height: 1.35; border: 2px solid #ccc; border-radius: 6px; padding: 6px; }
.card.right { border-color: #168c3c; } .card.wrong { border-color: #cd2d2d; }
.card b { display: block; } .card .pair { display: flex; gap: 4px; } .card .said { color: #555; }
.verdict { font-weight: 600; } .right .verdict { color: #168c3c; } .wrong .verdict { color: #cd2d2d; }
.chart { display: inline-block; margin: 0 12px 12px 0; vertical-align: top; width: 380px; }
.chart .title { font-size: 14px; font-weight: 600; } .chart .tick { font-size: 11px; fill: #666; }
.chart .rule { stroke: #e6e6e6; } figcaption { font-size: 12px; } figcaption span { margin-right: 10px; }
figcaption i { display: inline-block; width: 10px; height: 10px; margin-right: 3px; border-radius: 2px; }
"""


# For the eye: one sheet


def samples_sheet(results: Results, per_task: int = 3, images: int = 2) -> Image.Image:
    """Prompt, a true picture, and what was drawn each way, framed green where GenEval's rules hold, else red."""
    ways = [way for way in ("described", "direct") if results.drawn.get(way)]
    drawn = {way: _by_prompt(results.drawn[way]) for way in ways}
    headings = ["a true picture"] + [_WAYS[way] for way in ways for _ in range(images)]
    rows: list[Row] = []
    for tag in TAGS:
        prompts = [p for p, judged in drawn[ways[0]].items() if judged[0].metadata["tag"] == tag]
        for prompt in prompts[:per_task]:
            first = drawn[ways[0]][prompt][0]
            cells = [Cell(true_picture(first.metadata, first.image.shape[0]))]
            for way in ways:
                cells += [Cell(j.image, j.correct) for j in drawn[way].get(prompt, [])[:images]]
            rows.append((prompt.removeprefix("a photo of "), cells))
    title = "Green frame: right by GenEval's rules; red: wrong. The first pictures of each kind, not chosen."
    return labelled_grid(rows, headings, title=title, picture=96, text=170, blocks=2)


def pictures_sheet(real: Mapping[str, Any], most: int = 24) -> Image.Image:
    """Real pictures: what was asked, a true picture, the same decoded from its true vectors, what was drawn, and the
    training picture nearest to that; then pictures that were read, with what was read in them.

    A drawn picture's frame is green where the model itself reads in it what was asked, else red.
    """
    sheets = []
    if drawing := real.get("drawing"):
        rows: list[Row] = []
        right, near = drawing.get("read_as_asked"), drawing.get("nearest")
        for i, prompt in enumerate(drawing["prompts"][:most]):
            cells = [Cell(drawing["true"][i]), Cell(drawing["true_vectors"][i])]
            cells.append(Cell(drawing["drawn"][i], None if right is None else bool(right[i])))
            rows.append((prompt.removeprefix(draw_instruction("")), cells + ([] if near is None else [Cell(near[i])])))
        headings = ["true", "from its true vectors", "drawn", "nearest in training"]
        sheets.append(labelled_grid(rows, headings, picture=80, text=170))
    if reading := real.get("reading"):
        rows = []
        for read in reading[:most]:
            said = read["answer"] if read["correct"] else f"{read['answer']} (right: {read['truth']})"
            rows.append((said, [Cell(read["image"], read["correct"])]))
        sheets.append(labelled_grid(rows, ["read"], picture=80, text=230))
    title = "Unseen pictures, not chosen. Green frame: read rightly, by the model itself; red: not."
    return side_by_side(sheets, title)


def _by_prompt(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    prompts: dict[str, list[Judged]] = {}
    for j in judged:
        prompts.setdefault(j.metadata["prompt"], []).append(j)
    return prompts


# For the terminal


def summary(scores: Mapping[str, Any]) -> str:
    """The scores as a person reads them; every number is in scores.json."""
    lines = []
    if geneval := scores.get("geneval"):
        ways = [way for way in ("described", "direct") if way in geneval]
        lines.append("drawing (GenEval)".ljust(28) + "".join(way.rjust(12) for way in ways))
        for name in ("overall", *TAGS):
            numbers = [geneval[way][name] for way in ways] or [geneval[name]]
            lines.append(f"  {name}".ljust(28) + "".join(f"{n:12.3f}" for n in numbers))
        if "held_out" in geneval:
            shown = f"{geneval['held_out']:12.3f}"
            shown += f"   ({geneval['drawn']}; the same kinds of prompts otherwise {geneval['same_tasks']:.3f})"
            lines.append("  held_out".ljust(28) + shown)
    if spread := scores.get("spread"):
        lines.append("spread of one prompt's pictures".ljust(32) + "model".rjust(8) + "world".rjust(12))
        for name, world in spread["world"].items():
            own = spread["model"][name]
            lines.append(f"  {name}".ljust(28) + ("-".rjust(12) if own is None else f"{own:12.3f}") + f"{world:12.3f}")
    if reading := scores.get("reading"):
        lines.append("reading (exact match)")
        kinds = [k for k, v in reading.items() if isinstance(v, float)]
        lines += [f"  {kind}".ljust(28) + f"{reading[kind]:12.3f}" for kind in kinds]
    if reconstruction := scores.get("reconstruction"):
        lines.append("reconstruction (strict)")
        for name in ("true_vectors", "predicted_vectors"):
            lines.append(f"  {name}".ljust(28) + f"{reconstruction[name]:12.3f}")
    lines.append("seconds")
    lines += [f"  {name}".ljust(28) + f"{value:12.0f}" for name, value in scores["seconds"].items()]
    return "\n".join(lines)


# For reading at leisure: one file


def write_html(
    title: str, scores: Mapping[str, Any], results: Results, runs: Mapping[str, Path], metrics: Mapping[str, Any]
) -> str:
    """The report: `runs` are the stages' folders, `metrics` their logged lines."""
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(_machine())}. Everything here was measured by this run.</p>",
        _scores(scores),
        _training(runs, metrics),
        *(_drawing(way, results.drawn[way]) for way in _WAYS if results.drawn.get(way)),
        _reading(results),
        _reconstruction(results),
    ]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _text(words: Any) -> str:
    """Safe in HTML; what a model wrote may hold anything."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(words)))


def _machine() -> str:
    import jax

    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{devices}, {cores} cores of {platform.machine()}, {platform.system()}"


def _table(title: str, group: Mapping[str, Any]) -> str:
    rows = []
    for name, value in group.items():
        if not isinstance(value, Mapping):
            shown = number(value) if isinstance(value, float) else value
            rows.append(f'<tr><td>{_text(name)}</td><td class="number">{_text(shown)}</td></tr>')
    return f"<table><tr><th colspan=2>{_text(title)}</th></tr>{''.join(rows)}</table>"


def _scores(scores: Mapping[str, Any]) -> str:
    tables = []
    for name, group in scores.items():
        if isinstance(group, Mapping):
            tables.append(_table(name, group))
            tables += [_table(f"{name}: {k}", v) for k, v in group.items() if isinstance(v, Mapping)]
    whole = f"<details><summary>as JSON</summary><pre>{html.escape(json.dumps(scores, indent=1))}</pre></details>"
    return f"<h2>Scores</h2>{''.join(tables)}{whole}"


def _training(runs: Mapping[str, Path], metrics: Mapping[str, Any]) -> str:
    parts = ["<h2>Training</h2>"]
    for name, run in runs.items():
        parts += [f"<h3>{_text(name)}</h3>", *training_charts(metrics[name])]
        files = sorted((run / "samples").glob("*.png"))
        chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, _MOMENTS)}) if files else []
        for i in chosen:
            parts.append(f"<p>step {int(files[i].stem)}: held-out pictures above, the model's below</p>")
            parts.append(f'<img src="data:image/png;base64,{base64.b64encode(files[i].read_bytes()).decode()}">')
    return "".join(parts)


def _image(image: np.ndarray, side: int = 76) -> str:
    encoded = base64.b64encode(png(image)).decode()
    return f'<img width="{side}" height="{side}" src="data:image/png;base64,{encoded}">'


def _card(correct: bool, images: Sequence[np.ndarray], asked: str, said: str, verdict: str) -> str:
    pictures = "".join(_image(image) for image in images)
    said = f'<div class="said">{_text(said)}</div>' if said else ""
    mark = "✓" if correct else "✗"
    return (
        f'<div class="card {"right" if correct else "wrong"}"><div class="pair">{pictures}</div>'
        f'<b>{_text(asked)}</b>{said}<span class="verdict">{mark} {_text(verdict)}</span></div>'
    )


def _drawing(way: str, judged: Sequence[Judged], per_task: int = 12) -> str:
    parts = [f"<h2>Drawing: {_WAYS[way]}</h2>"]
    parts.append(
        "<p>Left a true picture, right the model's; below the prompt, its own description, GenEval's verdict.</p>"
    )
    for tag in TAGS:
        own = [j for j in judged if j.metadata["tag"] == tag]
        if own:
            right = sum(j.correct for j in own)
            parts.append(f"<h3>{tag}: {right} of {len(own)}</h3>{_reasons(own)}<div class=cards>")
            for j in own[:per_task]:
                images = [true_picture(j.metadata, j.image.shape[0]), j.image]
                prompt = j.metadata["prompt"].removeprefix("a photo of ")
                parts.append(_card(j.correct, images, prompt, j.description, "right" if j.correct else j.reason))
            parts.append("</div>")
    return "".join(parts)


def _reasons(judged: Sequence[Judged], most: int = 8) -> str:
    """What was wrong, the commonest first; one picture may lack several things."""
    counts = Counter(reason for j in judged for reason in j.reason.splitlines())
    rows = "".join(f'<tr><td>{_text(r)}</td><td class="number">{n}</td></tr>' for r, n in counts.most_common(most))
    more = f"<tr><td>{len(counts) - most} others</td><td></td></tr>" if len(counts) > most else ""
    return f"<table><tr><th>what was wrong</th><th>pictures</th></tr>{rows}{more}</table>" if counts else ""


def _confusion(asked: Sequence[Answered], most: int = 12) -> str:
    """Right answers down, the model's across, of the commonest `most` right answers; all else is "other"."""
    names = [answer for answer, _ in Counter(plain(a.truth) for a in asked).most_common(most)]
    names.sort()
    counts = Counter(tuple(x if x in names else "other" for x in (plain(a.truth), plain(a.answer))) for a in asked)
    shown = names + ["other"] * any("other" in pair for pair in counts)
    head = "".join(f"<th>{_text(n)}</th>" for n in shown)
    rows = []
    for truth in shown:
        cells = "".join(
            f'<td class="number{" right" * (truth == given != "other")}">{counts[truth, given] or ""}</td>'
            for given in shown
        )
        rows.append(f"<tr><th>{_text(truth)}</th>{cells}</tr>")
    return f"<table><tr><th>right ↓ given →</th>{head}</tr>{''.join(rows)}</table>"


def _reading(results: Results, per_kind: int = 12) -> str:
    parts = ["<h2>Reading</h2>"] if results.asked else []
    for kind in dict.fromkeys(a.kind for a in results.asked):
        own = [a for a in results.asked if a.kind == kind]
        parts.append(f"<h3>{kind}: {sum(a.correct for a in own)} of {len(own)}</h3>{_confusion(own)}<div class=cards>")
        for a in own[:per_kind]:
            verdict = a.answer if a.correct else f"{a.answer} (right: {a.truth})"
            parts.append(_card(a.correct, [a.image], a.question, "", verdict))
        parts.append("</div>")
    return "".join(parts)


def _reconstruction(results: Results, number: int = 16) -> str:
    if not results.reconstructed:
        return ""
    kinds = {"true": "true", "true_vectors": "decoded from true vectors", "predicted_vectors": "from predicted vectors"}
    rows = [(words, [Cell(i) for i in results.reconstructed[kind][:number]]) for kind, words in kinds.items()]
    sheet = png(labelled_grid(rows, [], picture=64, text=110))
    where = base64.b64encode(sheet).decode()
    return f'<h2>Reconstruction</h2><img src="data:image/png;base64,{where}">'
