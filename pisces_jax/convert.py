"""Published weights in, trained weights out, as safetensors.

python -m pisces_jax.convert import --from=FOLDER --out=DIR
python -m pisces_jax.convert export --workdir=DIR --out=FOLDER
"""

import signal

from pisces_jax.utils import cli
from pisces_jax.utils.errors import run_command

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
        "for a config to start from (init_from.NAME = DIR). This is optional, since a config may name the published "
        "folder itself. Nothing in the folder is executed, and nothing is left behind on failure. Memory stays small: "
        "one tensor of one layer at a time.",
        [
            "--from=Llama-3.1-8B-Instruct/ --out=weights/language_model --dtype=bfloat16",
            "--from=hf://meta-llama/Llama-3.2-1B-Instruct --out=weights/language_model",
            "--from=siglip-so400m-patch14-384/ --out=weights/understanding_encoder",
            "--from=clip-vit-large-patch14/ --out=weights/generation_encoder",
            "--from=Emu2-Gen/multimodal_encoder/ --out=weights/generation_encoder",
            "--from=stable-diffusion-xl-base-1.0/vae/ --out=weights/autoencoder",
            "--from=BLIP3o-Model-8B/ --out=weights/blip3o_8b",
        ],
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", required=True, metavar="FOLDER",
        help="a folder in the layout of transformers (LLaMA, Qwen2, SigLIP, CLIP), diffusers (AutoencoderKL, the "
        "UNet2DConditionModel of Emu2-Gen), timm, open_clip or Emu2 (EVA-CLIP), or a checkpoint of BLIP3-o; or "
        "hf://ORGANISATION/NAME[/SUBFOLDER][@REVISION], which is downloaded",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=cli.path, metavar="DIR", help="a new folder to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="the dtype to store (default: that of the files)")
    flags = parser.parse(argv)
    cli.check_output(flags.out, "--out", folder=True)

    from pisces_jax.weights.export import import_folder

    cli.start()
    folder, parameters = import_folder(flags.source, flags.out, flags.dtype)
    cli.say(f"{parameters:,} parameters of {folder.path} ({folder.family}) are in {flags.out}")


def export_weights(argv: list[str]) -> None:
    parser = cli.Parser(
        "convert export",
        "Writes each part of a run into its own folder below --out, as safetensors with a config.json. The language "
        "model, SigLIP and CLIP encoders are in the layout of transformers, EVA-CLIP has timm's names, the autoencoder "
        "is in the layout of diffusers, adapters are in that of PEFT, and parts without a published layout are in this "
        "project's own. convert import (not for adapters) and configs read all of them.",
        [
            "--workdir=runs/shapes --out=exported",
            "--workdir=runs/pisces_1b --run=stage3 --part=language_model --dtype=bfloat16 --out=exported",
        ],
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, type=cli.path, metavar="DIR", help="the folder of the training")
    parser.add_argument("--run", default="", help="the run in it (default: the unified run that finished last)")
    parser.add_argument("--part", action="append", default=[], help="a part to export; may be repeated (default: all)")
    parser.add_argument("--dtype", choices=_DTYPES, help="the dtype to store (default: that of the run)")
    parser.add_argument("--merge", action="store_true", help="multiply adapters out into the language model")
    parser.add_argument("--out", required=True, type=cli.path, metavar="FOLDER", help="a new folder to write")
    flags = parser.parse(argv)
    cli.check_output(flags.out, "--out", folder=True)

    from pisces_jax.inference.export import export_run

    cli.start()
    export_run(flags.workdir, flags.run, flags.part, flags.dtype, flags.out, flags.merge)


if __name__ == "__main__":
    # SIGTERM ends the command as Ctrl-C does, so that half-written folders are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(main)
