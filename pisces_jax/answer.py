"""Answers a question about a picture.

python -m pisces_jax.answer --workdir=DIR --image=F --question="what colour is the circle?"
"""

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    from pisces_jax.inference.flags import add_run_flags

    parser = cli.Parser(
        "answer",
        "Reads a picture and answers a question about it on standard output; without a question it describes it.",
        [
            '--workdir=runs/shapes --image=picture.png --question="how many circles are there?"',
            "--workdir=runs/shapes --image=picture.png",
        ],
    )
    add_run_flags(parser)
    parser.add_argument(
        "--image", required=True, type=cli.path, metavar="F", help="a picture: PNG, JPEG, WebP, GIF, BMP, TIFF"
    )
    parser.add_argument("--question", help="what to ask (default: to describe the picture)")
    parser.add_argument(
        "--max_tokens", type=cli.whole_number(1), default=96, help="longest answer, in tokens (default 96)"
    )
    parser.add_argument("--temperature", type=cli.number(0), default=0.0, help="0: the likeliest answer (default)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="for a temperature above 0")
    flags = parser.parse()
    if flags.question is not None and not flags.question.strip():
        raise UserError("--question is empty: ask something, or leave it out for a description")

    from pisces_jax.data.example import Picture, Text
    from pisces_jax.data.images import load_image
    from pisces_jax.data.instructions import DESCRIBE_INSTRUCTION
    from pisces_jax.inference.model import load_model

    image = load_image(str(flags.image))
    cli.start()
    model = load_model(flags.workdir, flags.run, batch_size=1)
    question = DESCRIBE_INSTRUCTION if flags.question is None else " ".join(flags.question.split())
    parts = (Picture(image, "read"), Text(question))
    cli.say(model.answer([parts], max_tokens=flags.max_tokens, temperature=flags.temperature, seed=flags.seed)[0])


if __name__ == "__main__":
    run_command(main)
