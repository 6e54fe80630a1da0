"""Charts of a run's metrics, drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]


def training_curves(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Points]]:
    """The curves of a run's metrics.jsonl, by quantity and by label: training, held out, and the held-out tasks."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step":
                series.setdefault(name, []).append((line["step"], value))
    charts: dict[str, dict[str, Points]] = {}
    for name, points in series.items():
        split, _, quantity = name.partition("/")
        head, _, task = quantity.partition("/")
        # Norms and speeds stay in metrics.jsonl; tasks are shown on held-out data only.
        if f"val/{head}" in series and not (task and split == "train"):
            label = task or {"train": "training", "val": "held out"}[split]
            charts.setdefault(head.replace("_", " "), {})[label] = points
    return charts


def line_chart(title: str, curves: Mapping[str, Points]) -> Any:
    """A matplotlib figure of the curves; training is thin, and a curve of one point is a dot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot there is no backend to choose

    with rc_context({"text.parse_math": False}):  # names may hold "$"
        figure = Figure(figsize=(4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for label, points in curves.items():
            width, marker = (1 if label == "training" else 2), ("o" if len(points) == 1 else None)
            axes.plot(*zip(*points, strict=True), linewidth=width, marker=marker)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        figure.legend(axes.lines, list(curves), loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    return figure


def svg(figure: Any) -> bytes:
    """The bytes of an SVG file."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text: a third of the size
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
