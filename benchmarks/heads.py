"""Compares the vector heads: trains configs/heads.py for every seed, scores every head, writes a table.

    python benchmarks/heads.py --workdir=runs/heads [--seeds=0,1,2] [--sets=shapes,cifar10,emoji] [--steps=1.0]

The same command continues: trained stages and finished scores are kept; the table is WORKDIR/heads.md. It was not run
to its end yet. On the shapes world every seed is trained; on the real sets the first one. Pictures are drawn directly
and after a description of the model's own; the real sets have no descriptions to learn from, so there directly alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pisces_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "configs"))
CONFIG = ROOT / "configs/heads.py"
TASKS = {
    "shapes": {"geneval": ["--task=geneval", "--both"], "reading": ["--task=reading"], "spread": ["--task=spread"]},
    "cifar10": {"judge": ["--task=judge", "--sets=test", "--pictures=400"], "pictures": ["--task=pictures"]},
    "emoji": {"judge": ["--task=judge", "--sets=val", "--pictures=400"], "pictures": ["--task=pictures"]},
}  # fmt: skip


def run(module: str, *flags: str) -> None:
    """A command of the package; where it fails, so does this one."""
    if status := subprocess.run([sys.executable, "-m", f"pisces_jax.{module}", *flags], cwd=ROOT).returncode:
        sys.exit(status)


def score(workdir: Path, world: str, head: str, last: str, amounts: list[str]) -> dict[str, Any]:
    """All scores of a trained head, kept beside its runs."""
    scores = {}
    for task, flags in TASKS[world].items():
        out = workdir / f"{world}_{head}_{task}.json"
        if not out.exists():
            judge = [f"--judge={workdir}/{world}_judge"] if task == "judge" else []
            run("evaluate", f"--workdir={workdir}", f"--run={world}_{head}_{last}", *flags, *judge, *amounts,
                f"--out={out}")  # fmt: skip
        scores[task] = json.loads(out.read_text())[task]
    return scores


def step_seconds(folder: Path) -> float:
    """The median of the seconds per step in a run's log, without its first line, which compiles."""
    seconds = [line["train/seconds_per_step"] for line in read_metrics(folder) if "train/seconds_per_step" in line]
    return statistics.median(seconds[1:] or seconds)


def flat(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested scores, by its path."""
    found: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Rows of numbers, columns of heads: the mean over seeds, and its standard error where there are several."""
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for name in dict.fromkeys(name for seeds in results.values() for one in seeds for name in one):
        cells = []
        for seeds in results.values():
            values = [one[name] for one in seeds if name in one]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{error}" if values else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    import heads

    from pisces_jax.training.config_files import load_stages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sets", default=",".join(TASKS))
    parser.add_argument("--heads", default=",".join(heads.HEADS))
    parser.add_argument("--steps", type=float, default=1.0, help="share of the config's steps")
    parser.add_argument("amounts", nargs="*", help="after --: flags of evaluate, as --per_task=10")
    flags = parser.parse_args()
    stages = load_stages(str(CONFIG), {})  # in the order of training
    parts = []
    for world in flags.sets.split(","):
        seeds = flags.seeds.split(",") if world == "shapes" else flags.seeds.split(",")[:1]
        results: dict[str, list[dict[str, float]]] = {head: [] for head in flags.heads.split(",")}
        for seed in seeds:
            workdir = flags.workdir.resolve() / f"seed{seed}"
            for name, stage in stages.items():
                wanted = name.split("_")[1] in results or stage.program != "unified"
                if name.split("_")[0] == world and wanted:
                    steps, warmup = (round(n * flags.steps) for n in (stage.steps, stage.optimizer.warmup_steps))
                    run("train", f"--config={CONFIG}:{name}", f"--workdir={workdir}", f"--config.seed={seed}",
                        f"--config.steps={steps}", f"--config.optimizer.warmup_steps={warmup}")  # fmt: skip
            last = [name for name in stages if name.startswith(f"{world}_mse_")][-1].rpartition("_")[2]
            for head, found in results.items():
                scores = flat(score(workdir, world, head, last, flags.amounts))
                scores["seconds a training step"] = step_seconds(workdir / f"{world}_{head}_{last}")
                found.append(scores)
        parts += [f"## {world}, seeds {', '.join(seeds)}, {flags.steps:g} of the steps", "", *table(results), ""]
        (flags.workdir / "heads.md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
