"""Looks after checkpoints: lists and verifies them, shows what they hold, compares two, copies one elsewhere.

python -m pisces_jax.checkpoint verify runs/shapes
"""

from collections.abc import Callable
from pathlib import Path

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    parser = cli.Parser(
        "checkpoint",
        "Looks after checkpoints. list: all below PATH, with sizes, and whether files are missing or cut off. verify: "
        "the same with every byte checked against the manifest. show: the arrays of one, with shapes, dtypes and "
        "norms. compare: the largest difference of each array between two. copy: one into a new folder, every byte of "
        "the copy checked. Only copy writes anything.",
        [
            "list runs/shapes",
            "verify runs/shapes/stage1",
            "show runs/shapes/stage1/checkpoints/60",
            "compare runs/shapes/stage1/checkpoints/40 runs/shapes/stage1/checkpoints/60",
            "copy runs/shapes/stage1 --out=/backup/stage1-60",
        ],
    )  # fmt: skip
    commands: dict[str, Callable[..., None]] = {
        "list": list_steps,
        "verify": verify,
        "show": show,
        "compare": compare,
        "copy": copy,
    }
    parser.add_argument("command", choices=list(commands), help="what to do")
    parser.add_argument(
        "path", type=cli.path, metavar="PATH",
        help="a checkpoint, or a run's folder for its newest whole one; for list and verify also a work directory",
    )  # fmt: skip
    parser.add_argument("other", type=cli.path, nargs="?", metavar="OTHER", help="compare: the other one")
    parser.add_argument("--out", type=cli.path, metavar="FOLDER", help="copy: a new folder to write")
    flags = parser.parse()
    for name, value, command in ("OTHER", flags.other, "compare"), ("--out", flags.out, "copy"):
        if (value is not None) != (flags.command == command):
            wrong = "missing: give it" if value is None else "given: leave it out"
            raise UserError(f"{name} is {wrong}, as in the examples of --help")
    if flags.out is not None:
        cli.check_output(flags.out, "--out", folder=True)
    if not flags.path.is_dir():
        raise UserError(f"{flags.path} is not a folder: give a checkpoint, a run's folder or a work directory")
    cli.start()
    commands[flags.command](flags.path, flags.other or flags.out)


def list_steps(path: Path, _: Path | None, content: bool = False) -> None:
    from pisces_jax.training.inspection import listed

    damaged = []
    for found in listed(path, content=content):
        cli.say(found)
        damaged += [found.folder] if found.damaged else []
    if damaged and content:
        raise UserError(f"{len(damaged)} of these checkpoints are damaged: training goes on from the newest whole one")


def verify(path: Path, other: Path | None) -> None:
    list_steps(path, other, content=True)


def show(path: Path, _: Path | None) -> None:
    from pisces_jax.training.inspection import shown, step_of

    for line in shown(step_of(path)):
        cli.say(line)


def compare(path: Path, other: Path) -> None:
    from pisces_jax.training.inspection import compared, step_of

    different = 0
    for name, largest in compared(step_of(path), step_of(other)):
        different += largest > 0
        cli.say(f"{name}  {largest:.6g}")
    cli.say("equal" if not different else f"{different} arrays differ")


def copy(path: Path, out: Path) -> None:
    from pisces_jax.training import inspection

    folder = inspection.step_of(path)
    inspection.copy(folder, out)
    cli.say(f"{folder} is in {out}, checked byte by byte")


if __name__ == "__main__":
    run_command(main)
