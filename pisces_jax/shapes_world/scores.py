"""The evaluation tasks of the shapes world."""

from pisces_jax.evaluation import report
from pisces_jax.evaluation.task import Task
from pisces_jax.shapes_world import drawing, reading, reconstruction, spread
from pisces_jax.shapes_world.detector import ShapesDetector

__all__ = ["KIND", "TASKS", "ShapesDetector"]
KIND = "shapes"  # of the sources that the tasks fit, in configs


def _fits(kinds: set[str]) -> bool:
    return KIND in kinds


TASKS = {
    "geneval": Task(_fits, drawing.run, sheet=lambda outcome: report.samples_sheet(outcome.drawn)),
    "spread": Task(_fits, spread.run),
    "reading": Task(_fits, reading.run),
    "reconstruction": Task(_fits, reconstruction.run),
}
