"""A conversation with a model in the terminal, with pictures.

python -m pisces_jax.chat --workdir=DIR
"""

import os
import sys
from pathlib import Path

from pisces_jax.utils import cli
from pisces_jax.utils.errors import reader_may_leave, run_command


def _say(characters: str) -> None:
    with reader_may_leave():
        sys.stdout.write(characters)
        sys.stdout.flush()


def main() -> None:
    from pisces_jax.inference import flags as shared
    from pisces_jax.inference.terminal import KINDS, kind_of

    parser = cli.Parser(
        "chat",
        "Reads lines and answers them. /image FILE shows the model a picture, /draw TEXT has one drawn, which is saved "
        "and shown where the terminal can (kitty, iTerm2, WezTerm, sixel); /help lists the rest.",
        ["--workdir=runs/shapes", "--workdir=runs/shapes --temperature=0.7 --top_p=0.9 --out=drawn"],
    )
    shared.add_run_flags(parser)
    shared.add_text_flags(parser, max_tokens=96)
    shared.add_context_flag(parser)
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="of what is sampled and drawn (default 0)")
    parser.add_argument("--out", type=cli.path, metavar="DIR2", default=Path("drawn"), help="where pictures are saved")
    parser.add_argument(
        "--inline", choices=("auto", "none", *KINDS), default="auto", help="how pictures are shown (default: as the "
        "terminal's environment variables tell)",
    )  # fmt: skip
    shared.add_mesh_flags(parser)
    flags = parser.parse()

    from pisces_jax.inference.model import load_model
    from pisces_jax.inference.talk import Talk, converse

    cli.check_output(flags.out, "--out", folder=True)
    how = shared.text_choice(flags)
    shown = {"auto": kind_of(os.environ) if sys.stdout.isatty() else "", "none": ""}.get(flags.inline, flags.inline)
    cli.start()
    model = load_model(flags.workdir, flags.run, batch_size=1, **shared.device_choice(flags))
    drawing = shared.drawing_choice(None, model.config)
    context = shared.context_choice(flags, model.config)
    converse(Talk(model, how, drawing, flags.out, context, flags.seed, shown, _say))


if __name__ == "__main__":
    run_command(main)
