"""Published weights in, trained weights out, as safetensors.

python -m pisces_jax.convert import --from=FOLDER --out=DIR
python -m pisces_jax.convert export --workdir=DIR --out=FOLDER
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command

_DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    argv = cli.arguments()
    commands = {"import": import_weights, "export": export_weights}
    if argv[:1] and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return
    parser = cli.Parser(
        "convert", "Published weights in, or trained weights out.",
        ["import --help", "export --help"],
    )  # fmt: skip
    parser.add_argument("command", choices=list(commands), help="import or export; each has its own --help")
    parser.parse(argv)


def import_weights(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert import",
        "Reads published safetensors with their config.json and writes the same values in this project's own layout, "
        "for a config to start from (init_from.NAME = DIR). Configs may name the published folder itself: then nothing "
        "needs to be imported. Nothing in the folder is executed, and nothing is left behind when it fails. Memory "
        "stays small whatever the size: one tensor of one layer at a time.",
        [
            "--from=Llama-3.1-8B-Instruct/ --out=weights/language_model --dtype=bfloat16",
            "--from=hf://meta-llama/Llama-3.2-1B-Instruct --out=weights/language_model",
            "--from=siglip-so400m-patch14-384/ --out=weights/understanding_encoder",
            "--from=clip-vit-large-patch14/ --out=weights/generation_encoder",
            "--from=Emu2-Gen/multimodal_encoder/ --out=weights/generation_encoder",
            "--from=stable-diffusion-xl-base-1.0/vae/ --out=weights/autoencoder",
        ],
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", required=True, metavar="FOLDER",
        help="a folder in the layout of transformers (LLaMA, SigLIP, CLIP), diffusers (AutoencoderKL), timm, open_clip "
        "or Emu2 (EVA-CLIP); or hf://ORGANISATION/NAME[/SUBFOLDER][@REVISION], which is downloaded",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write; a new one")
    parser.add_argument("--dtype", choices=_DTYPES, help="what to store in (default: as the files do)")
    flags = parser.parse(argv)
    cli.check_output(flags.out, "--out", folder=True)

    from pisces_jax.weights.folder import import_folder

    cli.start()
    with _ended_by_sigterm():
        folder, parameters = import_folder(flags.source, flags.out, flags.dtype)
    cli.say(f"{parameters:,} parameters of {folder.path} ({folder.family}) are in {flags.out}")


def export_weights(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert export",
        "Writes what a run trained: each part into its own folder below --out, as safetensors with a config.json. The "
        "language model is in the layout of transformers, SigLIP and CLIP encoders too, EVA-CLIP in timm's names, the "
        "autoencoder in that of diffusers, and what has no published layout in this project's own. convert import and "
        "configs read all of them.",
        [
            "--workdir=runs/shapes --out=exported",
            "--workdir=runs/pisces_1b --run=stage3 --part=language_model --dtype=bfloat16 --out=exported",
        ],
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the model was trained")
    parser.add_argument("--run", default="", help="the run in it (default: the unified one that was finished last)")
    parser.add_argument("--part", action="append", default=[], help="what to export; may be repeated (default: all)")
    parser.add_argument("--dtype", choices=_DTYPES, help="what to store in (default: as the run does)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the folder to write; a new one")
    flags = parser.parse(argv)
    cli.check_output(flags.out, "--out", folder=True)
    with _ended_by_sigterm():
        _export(flags.workdir, flags.run, flags.part, flags.dtype, flags.out)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that what is half written is cleared then too."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _export(workdir: Path, run: str, only: list[str], dtype: str | None, out: Path) -> None:
    from pisces_jax.inference.model import PARTS, find_run
    from pisces_jax.training.checkpoints import load_part, read_config
    from pisces_jax.training.config import decoder_run, part_settings
    from pisces_jax.training.tokenizer import load_tokenizer
    from pisces_jax.weights.folder import export_part, new_folder

    cli.start()
    run = run or find_run(workdir)
    config = read_config(workdir / run)
    where: dict[str, str] = {}  # part -> the run that it is taken from
    decoders = {"unified": decoder_run(config), "text": ""}
    if decoder := decoders.get(config.program, run):
        latent = "autoencoder" in read_config(workdir / decoder).model
        where |= dict.fromkeys(("generation_encoder", "decoder", *(("autoencoder",) if latent else ())), decoder)
    own = {"unified": PARTS, "text": ("language_model",), "pretrain": ("understanding_encoder",)}
    where |= dict.fromkeys(own.get(config.program, ()), run)
    if config.program == "pretrain":  # of one encoder, perhaps
        where = {part: run for part in where if part in config.model}
    if unknown := [part for part in only if part not in where]:
        raise UserError(f"--part={unknown[0]}: the parts of {workdir / run} are {', '.join(where)}")
    tokenizer = load_tokenizer(config, workdir)
    with new_folder(out) as scratch:
        for part in only or where:
            settings = part_settings(read_config(workdir / where[part]), part, tokenizer.vocab_size)
            params = load_part(workdir, where[part], part)
            beside = tokenizer if part == "language_model" else None
            family = export_part(scratch / part, part, settings, params, dtype=dtype, tokenizer=beside)
            cli.say(f"{part}: {family} layout, in {out / part}")


if __name__ == "__main__":
    run_command(main)
