"""Answers a question about a picture.

python -m pisces_jax.answer --workdir=DIR --image=F --question="what colour is the circle?"
"""

import dataclasses
import json

from pisces_jax.utils import cli
from pisces_jax.utils.errors import run_command


def main() -> None:
    from pisces_jax.inference import flags as shared

    parser = cli.Parser(
        "answer",
        "Reads a picture and answers a question about it on standard output; without a question it describes it. Many "
        "questions are answered in their order, each as a line of JSON.",
        [
            '--workdir=runs/shapes --image=picture.png --question="how many circles are there?"',
            "--workdir=runs/shapes --image=picture.png",
            '--workdir=runs/shapes --images=drawn --question="what colour is the circle?" --out=answers.jsonl',
            "--workdir=runs/shapes --questions=questions.jsonl --images=pictures --out=answers.jsonl",
        ],
    )
    shared.add_run_flags(parser)
    parser.add_argument("--image", type=cli.path, metavar="F", help="a picture: PNG, JPEG, WebP, GIF, BMP, TIFF")
    parser.add_argument("--question", help="what to ask (default: to describe the picture)")
    parser.add_argument(
        "--questions", type=cli.path, metavar="F.jsonl", help='a file with {"question": "...", "image": "FILE"} on '
        "each line; without an image the question is about text alone, without a question the picture is described",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=cli.path, metavar="DIR", help="the folder of those pictures (default: the file's); without "
        "--questions, each picture in it is read",
    )  # fmt: skip
    shared.add_text_flags(parser, max_tokens=96)
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="for a temperature above 0")
    parser.add_argument("--out", type=cli.path, metavar="F.jsonl", help="the file of lines (default: standard output)")
    shared.add_device_flags(parser)
    flags = parser.parse()

    from pisces_jax.data.example import Text
    from pisces_jax.data.instructions import DESCRIBE_INSTRUCTION
    from pisces_jax.inference.model import load_model
    from pisces_jax.utils.files import write_atomic

    asked, how = shared.given_questions(flags, DESCRIBE_INSTRUCTION), shared.text_choice(flags)
    if flags.out is not None:
        cli.check_output(flags.out, "--out", folder=False)
    cli.start()
    size = flags.batch_size or min(64, len(asked))
    model = load_model(flags.workdir, flags.run, batch_size=size, **shared.device_choice(flags))
    questions = [((line["picture"],) if line["picture"] else ()) + (Text(line["question"]),) for line in asked]
    answers = model.answer(questions, seed=flags.seed, **dataclasses.asdict(how))
    if flags.image is not None and flags.out is None:
        return cli.say(answers[0])
    lines = [
        json.dumps({k: v for k, v in line.items() if k != "picture"} | {"answer": text}, ensure_ascii=False)
        for line, text in zip(asked, answers, strict=True)
    ]
    if flags.out is None:
        return cli.say("\n".join(lines))
    write_atomic(flags.out, "\n".join(lines) + "\n")
    cli.say(f"{len(lines)} answers are in {flags.out}")


if __name__ == "__main__":
    run_command(main)
