"""Looks at the data of a config, or indexes shards: python -m pisces_jax.data inspect|stats|index ..."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisces_jax.data.show import page
from pisces_jax.data.stats import of_items, of_shards, table
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.utils.files import expand_home

MIXED = "--config=configs/mixed_small.py"
SHAPES = "--config=configs/shapes.py:stage2 --workdir=runs/shapes"


def main() -> None:
    argv = cli.arguments()
    commands = {"inspect": inspect, "stats": stats, "index": index}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"command {argv[0]!r} does not exist: give inspect, stats or index")
    about = "inspect: rows as an HTML page. stats: sizes, lengths, failures, packing. index: offsets of tar shards.\n"
    examples = [f"inspect {MIXED} --out=rows.html", f"stats {MIXED} --out=stats.json", "index --path='shards/*.tar'"]
    cli.Parser("data", f"{about}Each has a --help of its own.", examples).print_help()
    if not argv:
        raise UserError("the command is missing: give inspect, stats or index")


def inspect(argv: list[str]) -> None:
    about = "Writes groups of packed rows (or pairs) as an HTML page: pictures, text, what is learned, which source."
    parser = _parser("inspect", about, [f"{MIXED} --out=rows.html", f"{SHAPES} --first=1000 --count=2 --out=rows.html"])
    parser.add_argument("--out", required=True, type=cli.path, metavar="F.html", help="the page")
    parser.add_argument("--first", type=cli.whole_number(0), default=0, help="the first group or pair (default 0)")
    parser.add_argument("--count", type=cli.whole_number(1), default=4, help="how many (default 4)")
    with _opened(parser, argv) as (flags, items):
        shown = page(items, range(flags.first, flags.first + flags.count), f"Rows of {flags.config}")
    cli.write_files(flags.out.parent, {flags.out.name: shown.encode()}, "--out")
    cli.say(f"{flags.count} of {items.per_epoch} per epoch are in {flags.out}")


def stats(argv: list[str]) -> None:
    about = "Prints each source's numbers: examples, tokens, pictures, what is broken or left out; and the packing."
    parser = _parser("stats", about, [MIXED, f"{MIXED}:pretrain --pictures=1000 --out=stats.json"])
    parser.add_argument("--out", type=cli.path, metavar="F.json", help="a JSON file with every number")
    parser.add_argument("--pictures", type=cli.whole_number(0), default=200, help="to decode per source (default 200)")
    with _opened(parser, ["--config.data.max_broken=1.0", *argv]) as (flags, items):  # it counts what is broken
        found = of_items(items, flags.pictures)
    cli.say(table(found))
    if flags.out:
        cli.write_files(flags.out.parent, {flags.out.name: json.dumps(found, indent=1).encode()}, "--out")
        cli.say(f"the numbers are in {flags.out}")


def index(argv: list[str]) -> None:
    about = (
        "Indexes the offsets of tar shards, in parallel, where the index is missing or the shard changed. Training "
        "does so by itself; on a pod, index a bucket once before, in a folder that all hosts share."
    )
    examples = ["--path='shards/{00000..00099}.tar'", "--path='gs://bucket/*.tar' --index_dir=runs/index --workers=16"]
    parser = cli.Parser("data index", about, examples)
    parser.add_argument("--path", required=True, type=expand_home, help="of the shards, with {00..99}, {a,b} and *")
    parser.add_argument("--index_dir", help="where they go (default: beside the shards, those of a bucket in ~/.cache)")
    parser.add_argument("--workers", type=cli.whole_number(1), help="processes (default: one per core)")
    flags = parser.parse(argv)
    cli.say("\n".join(of_shards(flags.path, flags.index_dir, flags.workers)))


def _parser(command: str, about: str, examples: list[str]) -> cli.Parser:
    parser = cli.Parser(f"data {command}", about, examples)
    parser.add_argument("--config", required=True, metavar="FILE[:STAGE]", help="a config; by default its last stage")
    where = "a run's folder, for its tokenizer and lengths (default: a temporary one)"
    parser.add_argument("--workdir", type=cli.path, metavar="DIR", help=where)
    parser.add_argument("--evaluate", action="store_true", help="the held-out sources in place of those of training")
    return parser


@contextmanager
def _opened(parser: cli.Parser, argv: list[str]) -> Iterator[tuple[Any, Any]]:
    """The flags, and the packed rows or pairs of their config as its training reads them."""
    rest, overrides = cli.split_overrides(argv)
    flags = parser.parse(rest)
    if flags.out:
        cli.check_output(flags.out, "--out", folder=False)
    if flags.workdir:
        cli.check_output(flags.workdir, "--workdir", folder=True)
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.input import open_items

    config = list(load_stages(flags.config, overrides).values())[-1]
    with tempfile.TemporaryDirectory() as scratch:
        yield flags, open_items(config, flags.workdir or Path(scratch), flags.evaluate)


if __name__ == "__main__":
    run_command(main)
