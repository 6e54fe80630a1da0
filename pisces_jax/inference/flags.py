"""Flags of the commands that draw."""

import argparse
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.utils.cli import Parser, mesh_sizes, number, path, whole_number
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import sniff

_DTYPES = ("bfloat16", "float32")
DRAWING = ("describe", "temperature", "guidance", "vector_guidance")


def add_run_flags(parser: Parser) -> None:
    """Which run to use."""
    parser.add_argument(
        "--workdir", type=path, metavar="DIR", required=True,
        help="where the model was trained, or the folder of a released one (BLIP3-o: docs/blip3o.md)",
    )  # fmt: skip
    parser.add_argument("--run", default="", help="the run in it (default: the unified one that finished last)")


def add_device_flags(parser: Parser) -> None:
    """Where and how precisely to compute; what is not given is as the run's."""
    parser.add_argument("--batch_size", type=whole_number(1), help="pictures at once (default: all, at most 64)")
    parser.add_argument("--dtype", default="", choices=_DTYPES, help="to hold parameters and compute in")
    parser.add_argument(
        "--mesh", type=mesh_sizes, metavar="fsdp=8", help="share the work of several devices (default: one computes)"
    )
    parser.add_argument(
        "--offload", action="store_true",
        help="keep parameters in the host's memory: first the language model's go to the device, then the decoder's",
    )  # fmt: skip


def device_choice(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_model`, from the flags."""
    from pisces_jax.sharding import make_mesh

    mesh = make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **given.mesh}) if given.mesh else None
    return {"dtype": given.dtype, "mesh": mesh, "stay": not given.offload}


def given_seeds(given: argparse.Namespace, prompts: int) -> list[int] | None:
    """The seed of each picture, prompt by prompt, from `--seeds`; None without it."""
    return None if given.seeds is None else [*given.seeds] * prompts


def add_drawing_flags(parser: Parser) -> None:
    """How to draw; the run's config decides what is not given."""
    parser.add_argument(
        "--describe", action="store_true", default=None, help="let the model write a description of its own first"
    )
    parser.add_argument("--nodescribe", action="store_false", dest="describe", help="draw directly")
    parser.add_argument("--temperature", type=number(0), help="of the descriptions; 0: the likeliest words")
    parser.add_argument("--guidance", type=number(0), help="scale of the decoder's guidance; 1: none")
    parser.add_argument(
        "--noend_turn", action="store_false", dest="end_turn",
        help="BLIP3-o: without the end of turn that its training wrote before a picture; its own code draws so",
    )  # fmt: skip
    parser.add_argument("--vector_guidance", type=number(0), help="scale of the flow head's guidance; 1: none")


def drawing_choice(given: argparse.Namespace | None, config: ConfigDict) -> dict[str, Any]:
    """Arguments of `Model.draw`, from the flags and, where they are not given, from the run's config."""
    chosen = config.sampling
    flag = {name: getattr(given, name, None) for name in DRAWING}
    return {
        "describe": chosen.describe if flag["describe"] is None else flag["describe"],
        "max_tokens": chosen.max_tokens,
        "temperature": chosen.temperature if flag["temperature"] is None else flag["temperature"],
        "guidance": flag["guidance"],
        "vector_guidance": flag["vector_guidance"],
        "turn_ends": getattr(given, "end_turn", True),
    }


def seeds(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    return [whole_number(0)(word) for word in text.split(",")]


def add_prompt_flags(parser: Parser) -> None:
    """What to draw."""
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--prompts_file", type=path, metavar="F", help="a text file with a prompt on each line")


def given_prompts(flags: argparse.Namespace) -> list[str]:
    """All prompts of `--prompt` and `--prompts_file`.

    Raises:
        UserError: a prompt is empty, or the file cannot be read or holds none.
    """
    if not all(prompt.strip() for prompt in flags.prompt):
        raise UserError("--prompt is empty: say what to draw")
    prompts = flags.prompt
    if (file := flags.prompts_file) is not None:
        try:
            content = file.read_bytes()
            lines = content.decode("utf-8-sig").split("\n")  # other line breaks may stand within a prompt
        except OSError as error:
            raise UserError(f"--prompts_file={file} cannot be read ({error.strerror}): give a text file") from error
        except UnicodeDecodeError as error:
            found = sniff(content) or "not UTF-8 text"
            raise UserError(f"--prompts_file={file} is {found}: give a file with a prompt on each line") from error
        if not any(line.strip() for line in lines):
            raise UserError(f"--prompts_file={file} holds no prompt: write one on each line")
        prompts = prompts + [line for line in lines if line.strip()]
    return [" ".join(prompt.split()) for prompt in prompts]
