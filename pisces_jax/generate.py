"""Draws pictures of prompts.

python -m pisces_jax.generate --workdir=DIR --prompt="a photo of a red circle" --out=DIR2
"""

import json

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command

_MOST_ROWS = 100  # of the grid


def main() -> None:
    from pisces_jax.inference import flags as shared

    parser = cli.Parser(
        "generate",
        "Draws each prompt and writes the pictures (PNG), one grid of them all (grid.png), and the prompts with the "
        "descriptions that the model wrote before drawing (prompts.jsonl).",
        [
            '--workdir=runs/shapes --prompt="a photo of a red circle left of a blue square" --out=drawn',
            "--workdir=runs/shapes --prompts_file=prompts.txt --num_images=2 --seed=1 --nodescribe --out=drawn",
            "--workdir=runs/shapes --geneval=evaluation_metadata.jsonl --out=drawn",
            '--workdir=weights/BLIP3o-Model-8B --prompt="a red fox in the snow" --seeds=1,2,3 --out=drawn',
        ],
    )
    shared.add_run_flags(parser)
    shared.add_prompt_flags(parser)
    parser.add_argument(
        "--geneval", type=cli.path, metavar="F.jsonl", help="draw the prompts of a GenEval metadata file, and write "
        "the pictures in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png), for `evaluate --folder`",
    )  # fmt: skip
    parser.add_argument("--num_images", type=cli.whole_number(1), default=4, help="pictures per prompt (default 4)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, help="another seed, other pictures (default 0)")
    parser.add_argument("--seeds", type=shared.seeds, metavar="1,2", help="a picture of each prompt with each of these")
    shared.add_drawing_flags(parser)
    shared.add_device_flags(parser)
    parser.add_argument("--out", required=True, type=cli.path, metavar="DIR2", help="the folder to write into")
    flags = parser.parse()

    from pisces_jax.data.example import Text
    from pisces_jax.data.images import png
    from pisces_jax.data.instructions import draw_instruction
    from pisces_jax.evaluation import geneval, geneval_folder
    from pisces_jax.evaluation.grids import Cell, labelled_grid
    from pisces_jax.inference.model import load_model
    from pisces_jax.shapes_world.scene import SHAPES

    prompts = shared.given_prompts(flags)
    known = (*geneval.CLASSES, *SHAPES)
    metadata = geneval_folder.read_prompts(flags.geneval, known) if flags.geneval else []
    if prompts and flags.geneval:
        raise UserError("--geneval gives all prompts: leave --prompt and --prompts_file out")
    prompts += [(line["prompt"], None) for line in metadata]
    if not prompts:
        raise UserError("there is nothing to draw: give a prompt by --prompt, --prompts_file or --geneval")
    cli.check_output(flags.out, "--out", folder=True)
    if metadata and geneval_folder.prompt_folders(flags.out):
        raise UserError(f"--out={flags.out} holds pictures in GenEval's layout already: give another folder")

    cli.start()
    n = len(flags.seeds or range(flags.num_images))
    size = flags.batch_size or min(64, n * len(prompts))
    model = load_model(flags.workdir, flags.run, batch_size=size, **shared.device_choice(flags))
    how = shared.drawing_choice(flags, model.config)
    form = model.config.sampling.instruction
    parts = [
        [part for part in (picture, Text(draw_instruction(prompt, form))) if part is not None]
        for prompt, picture in prompts
    ]
    seeds = shared.given_seeds(flags, len(prompts))
    drawings = model.draw([one for one in parts for _ in range(n)], seed=flags.seed, seeds=seeds, **how)
    files: dict[str, bytes] = {}
    lines, rows = [], []
    for p, (prompt, _) in enumerate(prompts):
        own = drawings[p * n : (p + 1) * n]
        if metadata:
            made = geneval_folder.sample_files(p, metadata[p], [drawing.image for drawing in own])
        else:
            made = {f"{p:04d}_{i:02d}.png": png(drawing.image) for i, drawing in enumerate(own)}
        files |= made
        pictures = [name for name in made if name.endswith(".png")]
        for name, drawing, seed in zip(pictures, own, flags.seeds or [flags.seed] * n, strict=True):
            description = drawing.description if how["describe"] else None
            lines.append({"file": name, "prompt": prompt, "description": description, "seed": seed})
        rows.append((prompt, [Cell(drawing.image) for drawing in own]))
    files["grid.png"] = png(labelled_grid(rows[:_MOST_ROWS], [], picture=128))
    files["prompts.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cli.write_files(flags.out, files, "--out")
    cli.say(f"{len(drawings)} pictures of {len(prompts)} prompts are in {flags.out}, side by side in grid.png")
    if len(rows) > _MOST_ROWS:
        cli.say(f"grid.png shows the first {_MOST_ROWS} prompts")


if __name__ == "__main__":
    run_command(main)
