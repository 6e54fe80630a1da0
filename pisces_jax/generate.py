"""Draws pictures of prompts.

python -m pisces_jax.generate --workdir=DIR --prompt="a photo of a red circle" --out=DIR2
"""

import json
from pathlib import Path

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command

_MOST_ROWS = 100  # of the grid


def main() -> None:
    from pisces_jax.inference.flags import add_drawing_flags, drawing_choice

    parser = cli.Parser(
        "generate",
        "Draws each prompt and writes the pictures (PNG), one grid of them all (grid.png), and the prompts with the "
        "descriptions that the model wrote before drawing (prompts.jsonl).",
        [
            '--workdir=runs/shapes --prompt="a photo of a red circle left of a blue square" --out=drawn',
            "--workdir=runs/shapes --prompts_file=prompts.txt --num_images=2 --seed=1 --nodescribe --out=drawn",
        ],
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the model was trained")
    parser.add_argument("--run", default="", help="the run in it (default: the unified one that was finished last)")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--prompts_file", type=Path, metavar="F", help="a text file with a prompt on each line")
    parser.add_argument("--num_images", type=cli.whole_number(1), default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="another seed, other pictures (default 0)")
    add_drawing_flags(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR2", help="the folder to write into")
    flags = parser.parse()
    prompts = _prompts(flags.prompt, flags.prompts_file)
    cli.check_output(flags.out, "--out", folder=True)

    from pisces_jax.data.example import Text
    from pisces_jax.data.instructions import draw_instruction
    from pisces_jax.evaluation.grids import Cell, labelled_grid, png
    from pisces_jax.inference.model import load_model

    cli.start()
    asked = [prompt for prompt in prompts for _ in range(flags.num_images)]
    model = load_model(flags.workdir, flags.run, batch_size=min(64, len(asked)))
    how = drawing_choice(flags, model.config)
    drawings = model.draw([(Text(draw_instruction(prompt)),) for prompt in asked], seed=flags.seed, **how)
    files: dict[str, bytes] = {}
    lines, rows = [], []
    for p, prompt in enumerate(prompts):
        own = drawings[p * flags.num_images : (p + 1) * flags.num_images]
        for i, drawing in enumerate(own):
            name = f"{p:04d}_{i:02d}.png"
            files[name] = png(drawing.image)
            description = drawing.description if how["describe"] else None
            lines.append({"file": name, "prompt": prompt, "description": description, "seed": flags.seed})
        rows.append((prompt, [Cell(drawing.image) for drawing in own]))
    files["grid.png"] = png(labelled_grid(rows[:_MOST_ROWS], [], picture=128))
    files["prompts.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cli.write_files(flags.out, files, "--out")
    cli.say(f"{len(drawings)} pictures of {len(prompts)} prompts are in {flags.out}, side by side in grid.png")
    if len(rows) > _MOST_ROWS:
        cli.say(f"grid.png shows the first {_MOST_ROWS} prompts")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """All prompts of the command line and the file.

    Raises:
        UserError: there is none, one is empty, or the file cannot be read.
    """
    for prompt in given:
        if not prompt.strip():
            raise UserError("--prompt is empty: say what to draw")
    prompts = [" ".join(prompt.split()) for prompt in given]
    if file is not None:
        try:
            lines = [" ".join(line.split()) for line in file.read_text("utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"--prompts_file={file} cannot be read ({error.strerror}): give a text file") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompts_file={file} is no text in UTF-8: give a file with a prompt on each line"
            ) from error
        if not any(lines):
            raise UserError(f"--prompts_file={file} holds no prompt: write one on each line")
        prompts += [line for line in lines if line]
    if not prompts:
        raise UserError("there is nothing to draw: give --prompt or --prompts_file")
    return prompts


if __name__ == "__main__":
    run_command(main)
