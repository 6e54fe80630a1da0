"""What the demo leaves behind: a sheet of samples, a summary for the terminal, and a report in one HTML file."""

import base64
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pisces_jax.data.images import png
from pisces_jax.evaluation.answers import Answered, plain
from pisces_jax.evaluation.charts import line_chart, svg, training_curves
from pisces_jax.evaluation.geneval import TAGS, Judged
from pisces_jax.evaluation.grids import Cell, Row, labelled_grid
from pisces_jax.evaluation.suite import Results, number

WAYS = {
    "described": "described, then drawn",
    "direct": "drawn directly",
    "held_out": "held-out combinations",
    "other_words": "in other words",
}
_MOMENTS = 4  # of training, whose samples are shown


# A sheet to look at


def samples_sheet(judged: Mapping[str, Sequence[Judged]], per_task: int = 3, images: int = 2) -> Image.Image:
    """Prompt, a true picture, and what was drawn each way, framed green where GenEval's rules hold, else red."""
    ways = [way for way in ("described", "direct") if judged.get(way)]
    drawn = {way: _by_prompt(judged[way]) for way in ways}
    headings = ["a true picture"] + [WAYS[way] for way in ways for _ in range(images)]
    rows: list[Row] = []
    for tag in TAGS:
        prompts = [p for p, own in drawn[ways[0]].items() if own[0].metadata["tag"] == tag]
        for prompt in prompts[:per_task]:
            truth = drawn[ways[0]][prompt][0].truth
            cells = [] if truth is None else [Cell(truth)]
            for way in ways:
                cells += [Cell(j.image, j.correct) for j in drawn[way].get(prompt, [])[:images]]
            rows.append((prompt.removeprefix("a photo of "), cells))
    title = "Green frame: right by GenEval's rules; red: wrong. The first pictures of each kind, not chosen."
    return labelled_grid(rows, headings, title=title, picture=96, text=170, blocks=2)


def _by_prompt(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    prompts: dict[str, list[Judged]] = {}
    for j in judged:
        prompts.setdefault(j.metadata["prompt"], []).append(j)
    return prompts


# A summary for the terminal


def summary(scores: Mapping[str, Any]) -> str:
    """The scores as a person reads them; every number is in scores.json."""
    lines = []

    def add(name: str, *values: float | None, more: str = "") -> None:
        shown = "".join("-".rjust(12) if value is None else f"{value:12.3f}" for value in values)
        lines.append(f"  {name}".ljust(28) + shown + more)

    if geneval := scores.get("geneval"):
        ways = [way for way in ("described", "direct") if way in geneval]
        lines.append("drawing (GenEval)".ljust(28) + "".join(way.rjust(12) for way in ways))
        for name in ("overall", *TAGS):
            add(name, *([geneval[way][name] for way in ways] or [geneval[name]]))
        if "held_out" in geneval:
            same = f"the same kinds of prompts otherwise {geneval['same_tasks']:.3f}"
            add("held_out", geneval["held_out"], more=f"   ({geneval['drawn']}; {same})")
        if "other_words" in geneval:
            add("other_words", geneval["other_words"], more=f"   ({geneval['drawn']}; wordings held out of training)")
    if spread := scores.get("spread"):
        lines.append("spread of one prompt's pictures".ljust(32) + "model".rjust(8) + "world".rjust(12))
        for name, world in spread["world"].items():
            add(name, spread["model"][name], world)
    if reading := scores.get("reading"):
        lines.append("reading (exact match)")
        for kind, value in reading.items():
            if isinstance(value, float):
                add(kind, value)
    if reconstruction := scores.get("reconstruction"):
        lines.append("reconstruction (strict)")
        for name in ("true_vectors", "predicted_vectors"):
            add(name, reconstruction[name])
    lines.append("seconds")
    lines += [f"  {name}".ljust(28) + f"{value:12.0f}" for name, value in scores["seconds"].items()]
    return "\n".join(lines)


# A report in one file


def write_html(
    title: str, scores: Mapping[str, Any], results: Results, runs: Mapping[str, Path], metrics: Mapping[str, Any]
) -> str:
    """The report as one HTML file without scripts: `runs` are the stages' folders, `metrics` their logged lines."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png": _embedded_png, "number": lambda x: number(x) if isinstance(x, float) else x}
    outcomes = results.outcomes
    return environment.get_template("report.html.jinja").render(
        title=title,
        machine=_machine(),
        scores=scores,
        whole=json.dumps(scores, indent=1),
        stages={name: _stage(run, metrics[name]) for name, run in runs.items()},
        drawings=[(WAYS[way], _by_tag(o.drawn[way])) for o in outcomes.values() for way in WAYS if o.drawn.get(way)],
        readings=[
            (heading, _by_kind(asked))
            for o in outcomes.values()
            for heading, asked in (("Reading", o.asked), ("Reading: in other words", o.asked_in_other_words))
            if asked
        ],
        rows={name: _rows(o.rows) for name, o in outcomes.items() if o.rows},
        reasons=reasons,
        confusion=confusion,
    )


def _printable(value: Any) -> Any:
    """Text without control characters: what a model wrote may hold anything."""
    if not isinstance(value, str) or value.isprintable() or hasattr(value, "__html__"):  # which has been here before
        return value
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value)


def _machine() -> str:
    import jax

    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{devices}, {cores} cores of {platform.machine()}, {platform.system()}"


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _embedded_png(image: Image.Image | np.ndarray) -> str:
    return _embedded(png(image), "png")


def _stage(run: Path, metrics: Any) -> dict[str, Any]:
    """Charts of a stage, and (step, picture) of samples from a few moments of its training."""
    files = sorted((run / "samples").glob("*.png"))
    moments = sorted({round(i) for i in np.linspace(0, len(files) - 1, _MOMENTS)}) if files else []
    return {
        "charts": [_embedded(svg(line_chart(*chart)), "svg+xml") for chart in training_curves(metrics).items()],
        "samples": [(int(files[i].stem), _embedded(files[i].read_bytes(), "png")) for i in moments],
    }


def _by_tag(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    own = {tag: [j for j in judged if j.metadata["tag"] == tag] for tag in TAGS}
    return {tag: some for tag, some in own.items() if some}


def reasons(judged: Sequence[Judged]) -> list[tuple[str, int]]:
    """What was wrong and in how many pictures, the commonest first; one picture may lack several things."""
    return Counter(reason for j in judged for reason in j.reason.splitlines()).most_common()


def _by_kind(asked: Sequence[Answered]) -> dict[str, list[Answered]]:
    return {kind: [a for a in asked if a.kind == kind] for kind in dict.fromkeys(a.kind for a in asked)}


def confusion(asked: Sequence[Answered], most: int = 12) -> tuple[list[str], Counter[tuple[str, str]]]:
    """The commonest `most` right answers, "other" for all else if there is any, and the counts of (right, given)."""
    names = [answer for answer, _ in Counter(plain(a.truth) for a in asked).most_common(most)]
    names.sort()
    pairs = [[x if x in names else "other" for x in (plain(a.truth), plain(a.answer))] for a in asked]
    counts = Counter((right, given) for right, given in pairs)
    return names + ["other"] * any("other" in pair for pair in counts), counts


def _rows(rows: Mapping[str, np.ndarray], most: int = 16) -> Image.Image:
    """Rows of pictures under their headings, as one picture."""
    return labelled_grid([(heading, [Cell(i) for i in row[:most]]) for heading, row in rows.items()], [], picture=64,
                         text=110)  # fmt: skip
