"""Looks at the data of a config, or indexes shards.

python -m pisces_jax.data inspect|stats|index ...
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    argv = cli.arguments()
    commands: dict[str, Callable[[list[str]], None]] = {"inspect": inspect, "stats": stats, "index": index}
    if not argv or argv[0] in ("-h", "--help"):
        parser = cli.Parser(
            "data",
            "inspect: rows as an HTML page. stats: sizes, lengths, failures, packing. index: offsets of tar shards.\n"
            "Each has --help of its own.",
            [
                "inspect --config=configs/mixed_small.py --out=rows.html",
                "stats --config=configs/mixed_small.py --out=stats.json",
                "index --path='shards/{00000..00099}.tar'",
            ],
        )
        parser.print_help()
        if not argv:
            raise UserError("the command is missing: give inspect, stats or index")
        return
    if argv[0] not in commands:
        raise UserError(f"command {argv[0]!r} does not exist: give inspect, stats or index")
    commands[argv[0]](argv[1:])


def _parser(name: str, description: str, examples: list[str]) -> cli.Parser:
    parser = cli.Parser(f"data {name}", description, examples)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:STAGE]", help="a config; with no stage its last one that packs rows"
    )
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR",
        help="a run's folder, for its tokenizer and lengths (default: made for the occasion)",
    )  # fmt: skip
    parser.add_argument("--evaluate", action="store_true", help="the held-out sources in place of those of training")
    return parser


def inspect(argv: list[str]) -> None:
    rest, overrides = cli.split_overrides(argv)
    parser = _parser(
        "inspect",
        "Writes groups of packed rows (or pairs) as an HTML page: pictures, text, what is learned, which source.",
        [
            "--config=configs/mixed_small.py --out=rows.html",
            "--config=configs/shapes.py:stage2 --workdir=runs/shapes --first=1000 --count=2 --out=rows.html",
        ],
    )
    parser.add_argument("--out", required=True, type=Path, metavar="F.html", help="the page")
    parser.add_argument("--first", type=cli.whole_number(0), default=0, help="the first group or pair (default 0)")
    parser.add_argument("--count", type=cli.whole_number(1), default=4, help="how many (default 4)")
    flags = parser.parse(rest)
    cli.check_output(flags.out, "--out", folder=False)
    from pisces_jax.data.show import page

    with _items(flags, overrides) as items:
        shown = page(items, range(flags.first, flags.first + flags.count), f"Rows of {flags.config}")
    cli.write_files(flags.out.parent, {flags.out.name: shown.encode()}, "--out")
    cli.say(f"{flags.count} of {items.per_epoch} an epoch are in {flags.out}")


def stats(argv: list[str]) -> None:
    rest, overrides = cli.split_overrides(argv)
    parser = _parser(
        "stats",
        "Prints each source's numbers: examples, tokens, pictures, what is broken or left out; and the packing.",
        [
            "--config=configs/mixed_small.py",
            "--config=configs/mixed_small.py:pretrain --pictures=1000 --out=stats.json",
        ],
    )
    parser.add_argument("--out", type=Path, metavar="F.json", help="a JSON file with every number")
    parser.add_argument(
        "--pictures", type=cli.whole_number(0), default=200, help="of each source to decode (default 200)"
    )
    flags = parser.parse(rest)
    if flags.out:
        cli.check_output(flags.out, "--out", folder=False)
    from pisces_jax.data.stats import of_items, table

    # What is broken is to be seen here, not refused.
    with _items(flags, {"data.max_broken": "1.0", **overrides}) as items:
        found = of_items(items, flags.pictures)
    cli.say(table(found))
    if flags.out:
        cli.write_files(flags.out.parent, {flags.out.name: json.dumps(found, indent=1).encode()}, "--out")
        cli.say(f"the numbers are in {flags.out}")


def index(argv: list[str]) -> None:
    parser = cli.Parser(
        "data index",
        "Makes the index of offsets of tar shards, in parallel, where it is missing or a shard changed. Training does "
        "so by itself; on a pod it is better done once before, for a bucket in a folder that all hosts share.",
        ["--path='shards/{00000..00099}.tar'", "--path='gs://bucket/*.tar' --index_dir=runs/index --workers=16"],
    )
    parser.add_argument("--path", required=True, help="pattern of the shards: {00..99}, {a,b} and * are understood")
    parser.add_argument("--index_dir", help="where they go (default: beside the shards, those of a bucket in ~/.cache)")
    parser.add_argument("--workers", type=cli.whole_number(1), help="processes (default: one a core)")
    flags = parser.parse(argv)
    from pisces_jax.data import storage
    from pisces_jax.data.formats.webdataset import PROBLEMS, WebDataset

    shards = WebDataset(flags.path, index_dir=flags.index_dir, index_workers=flags.workers)
    cli.say(f"{len(shards)} samples in {len(shards.paths)} shards")
    for problem, n in zip(PROBLEMS[1:], shards.problems()[1:], strict=True):
        if n:
            cli.say(f"  {problem}: {n}")
    if flags.index_dir is None and any(map(storage.is_remote, shards.paths)):
        cli.say(
            "the indices are in this host's cache, which others do not see: give --index_dir a folder that all share, "
            "and the source the same index_dir"
        )


@contextmanager
def _items(flags: Any, overrides: dict[str, str]) -> Iterator[Any]:
    """The packed rows or pairs of a config, as its training reads them."""
    from pisces_jax.training.config_files import load_stages

    stages = load_stages(flags.config, overrides)
    packed = [config for config in stages.values() if config.program == "unified"]
    config = packed[-1] if packed else list(stages.values())[-1]
    from pisces_jax.training import input as training_input
    from pisces_jax.training.programs import make_program
    from pisces_jax.training.tokenizer import load_tokenizer

    sources = config.data.evaluate if flags.evaluate else config.data.train
    if not sources:
        raise UserError(f"data.{'evaluate' if flags.evaluate else 'train'} names no source: give at least one")
    with tempfile.TemporaryDirectory() as scratch:
        workdir = flags.workdir or Path(scratch)
        tokenizer = load_tokenizer(config, workdir)
        program = make_program(config, tokenizer.vocab_size)
        per_epoch = None if flags.evaluate else config.data.examples_per_epoch or None
        yield training_input.items(
            config, tokenizer, program, workdir, sources, examples_per_epoch=per_epoch, shuffle=not flags.evaluate
        )


if __name__ == "__main__":
    run_command(main)
