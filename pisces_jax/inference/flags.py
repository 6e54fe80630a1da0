"""Flags of the commands that draw."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from pisces_jax.data.example import Picture
from pisces_jax.data.images import EncodedImage, load_image
from pisces_jax.utils.cli import Parser, mesh_sizes, number, path, whole_number
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import sniff

if TYPE_CHECKING:
    from pisces_jax.inference.sampling import TextSampling

_DTYPES = ("bfloat16", "float32")
_CONTEXT = 512
DRAWING = ("describe", "temperature", "guidance", "steps", "solver", "vector_guidance")


def add_run_flags(parser: Parser) -> None:
    """Which run to use."""
    parser.add_argument(
        "--workdir", type=path, metavar="DIR", required=True,
        help="where the model was trained, or the folder of a released one (BLIP3-o: docs/blip3o.md)",
    )  # fmt: skip
    parser.add_argument("--run", default="", help="the run in it (default: the unified one that finished last)")


def add_device_flags(parser: Parser) -> None:
    """Where and how precisely to compute; what is not given is as the run's."""
    parser.add_argument("--batch_size", type=whole_number(1), help="rows at once (default: all, at most 64)")
    add_mesh_flags(parser)
    parser.add_argument(
        "--offload", action="store_true",
        help="keep parameters in the host's memory: first the language model's go to the device, then the decoder's",
    )  # fmt: skip


def add_mesh_flags(parser: Parser) -> None:
    """Those of `add_device_flags` that a model takes for good."""
    parser.add_argument("--dtype", default="", choices=_DTYPES, help="to hold parameters and compute in")
    parser.add_argument(
        "--mesh", type=mesh_sizes, metavar="fsdp=8", help="share the work of several devices (default: one computes)"
    )


def device_choice(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_model`, from the flags."""
    from pisces_jax.sharding import make_mesh

    mesh = make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **given.mesh}) if given.mesh else None
    return {"dtype": given.dtype, "mesh": mesh, "stay": not getattr(given, "offload", False)}


def given_seeds(given: argparse.Namespace, prompts: int) -> list[int] | None:
    """The seed of each picture, prompt by prompt, from `--seeds`; None without it."""
    return None if given.seeds is None else [*given.seeds] * prompts


def add_text_flags(parser: Parser, max_tokens: int) -> None:
    """How texts are written (`sampling.TextSampling`)."""
    parser.add_argument(
        "--max_tokens",
        type=whole_number(1),
        default=max_tokens,
        help=f"longest answer, in tokens (default {max_tokens})",
    )
    parser.add_argument("--temperature", type=number(0), default=0.0, help="0: the likeliest answer (default)")
    parser.add_argument("--top_k", type=whole_number(0), default=0, help="of the k likeliest tokens alone (0: of all)")
    parser.add_argument(
        "--top_p", type=number(0), default=1.0, help="of the likeliest tokens alone whose probabilities add up to p"
    )
    parser.add_argument(
        "--repetition_penalty", type=number(0), default=1.0, help="makes tokens that came already less likely (1: not)"
    )
    parser.add_argument("--stop", action="append", default=[], help="an answer ends before this text; several times")


def add_context_flag(parser: Parser) -> None:
    """How long a conversation may be."""
    parser.add_argument(
        "--context", type=whole_number(2), help="tokens of a conversation and its answer together (default: the run's "
        f"rows, at least {_CONTEXT})",
    )  # fmt: skip


def context_choice(given: argparse.Namespace, config: ConfigDict) -> int:
    """`--context`, or what it is without."""
    return given.context or max(_CONTEXT, config.data.row_length)


def text_choice(given: argparse.Namespace) -> "TextSampling":
    """
    Raises:
        UserError: a value is out of its range.
    """
    from pisces_jax.inference.sampling import TextSampling

    return TextSampling(
        given.max_tokens, given.temperature, given.top_k, given.top_p, given.repetition_penalty, tuple(given.stop)
    )


def add_drawing_flags(parser: Parser) -> None:
    """How to draw; the run's config decides what is not given."""
    parser.add_argument(
        "--describe", action="store_true", default=None, help="let the model write a description of its own first"
    )
    parser.add_argument("--nodescribe", action="store_false", dest="describe", help="draw directly")
    parser.add_argument("--temperature", type=number(0), help="of the descriptions; 0: the likeliest words")
    parser.add_argument("--guidance", type=number(0), help="scale of the decoder's guidance; 1: none")
    parser.add_argument("--steps", type=whole_number(1), help="of the decoder's sampler")
    parser.add_argument(
        "--solver", choices=("euler", "heun", "dpm++"), help="of a decoder that follows a flow (docs/inference.md)"
    )
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
        **{name: flag[name] for name in ("guidance", "steps", "solver", "vector_guidance")},
        "turn_ends": getattr(given, "end_turn", True),
    }


def seeds(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    return [whole_number(0)(word) for word in text.split(",")]


def add_prompt_flags(parser: Parser) -> None:
    """What to draw."""
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument(
        "--prompts_file", type=path, metavar="F", help="a text file with a prompt on each line, or JSON Lines (.jsonl) "
        '{"prompt": "...", "image": "FILE"}, where the model reads the picture, if there is one, before it draws',
    )  # fmt: skip
    parser.add_argument("--images", type=path, metavar="DIR", help="where pictures lie (default: beside the file)")


def given_prompts(flags: argparse.Namespace) -> list[tuple[str, Picture | None]]:
    """All prompts of `--prompt` and `--prompts_file`, with the pictures that lines of JSON name.

    Raises:
        UserError: a prompt is empty, or the file cannot be read, holds none or a line that is none.
    """
    if not all(prompt.strip() for prompt in flags.prompt):
        raise UserError("--prompt is empty: say what to draw")
    prompts: list[tuple[str, Picture | None]] = [(prompt, None) for prompt in flags.prompt]
    if (file := flags.prompts_file) is not None:
        if file.suffix == ".jsonl":
            objects = _objects(file, "--prompts_file", "prompt", "image")
            prompts += [(line["prompt"], _picture(line, flags.images or file.parent)) for line in objects]
        else:
            prompts += [(line, None) for line in _lines(file, "--prompts_file").values()]
        if len(prompts) == len(flags.prompt):
            raise UserError(f"--prompts_file={file} holds no prompt: write one on each line")
    return [(" ".join(prompt.split()), picture) for prompt, picture in prompts]


def given_questions(flags: argparse.Namespace, usual: str) -> list[dict[str, Any]]:
    """The questions of a command, in order: `question`, `image` (a name, or none), and `picture` to be read.

    Args:
        usual: what is asked where nothing is.

    Raises:
        UserError: nothing or too much is given, a file cannot be read, or a line is no question.
    """
    usual = usual if flags.question is None else " ".join(flags.question.split())
    if not usual:
        raise UserError("--question is empty: ask something, or leave it out for a description")
    if flags.questions is not None:
        if flags.image or flags.question is not None:
            raise UserError("--questions names pictures and questions itself: leave --image and --question out")
        asked = _objects(flags.questions, "--questions", "question", "image", usual=usual)
        if not asked:
            raise UserError(f"--questions={flags.questions} holds no question: write one on each line")
        root = flags.images or flags.questions.parent
    else:
        if bool(flags.image) == bool(flags.images):
            raise UserError("there is nothing to read: give a picture (--image), a folder (--images) or --questions")
        names = [flags.image.name] if flags.image else pictures_in(flags.images)
        asked, root = [{"question": usual, "image": name} for name in names], flags.images or flags.image.parent
    return [{**line, "picture": _picture(line, root)} for line in asked]


def pictures_in(folder: Path) -> list[str]:
    """The names of the pictures in a folder, sorted.

    Raises:
        UserError: there are none.
    """
    known = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in known) if folder.is_dir() else []
    if not names:
        raise UserError(f"--images={folder} holds no pictures: give a folder with PNG, JPEG or the like")
    return names


def _picture(line: dict[str, Any], root: Path) -> Picture | None:
    """The picture that a line names. It is decoded once here, so that a broken one is told before there is any work.

    Raises:
        UserError: it cannot be read.
    """
    if (name := line.get("image")) is None:
        return None
    path = root / name
    load_image(path)
    return Picture(EncodedImage(path.read_bytes, str(path)), "read")


def _objects(file: Path, flag: str, wanted: str, *others: str, usual: str | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line: the text `wanted`, `usual` where it lacks, and others that may lack.

    Raises:
        UserError: the file cannot be read, or a line is none.
    """
    objects = []
    for n, line in _lines(file, flag).items():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and usual is not None:
            found = {wanted: usual, **found}
        if (
            not isinstance(found, dict)
            or not isinstance(found.get(wanted), str)
            or not found[wanted].strip()
            or not all(isinstance(found.get(name), str | None) for name in others)
        ):
            form = ", ".join(f'"{name}": "..."' for name in (wanted, *others))
            raise UserError(f"{flag}={file}, line {n} is not of the form {{{form}}}: repair or remove it")
        objects.append(found)
    return objects


def _lines(file: Path, flag: str) -> dict[int, str]:
    """The lines of a text file that are not empty, by number.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # other line breaks may stand within a line
    except OSError as error:
        raise UserError(f"{flag}={file} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        found = sniff(content) or "not UTF-8 text"
        raise UserError(f"{flag}={file} is {found}: give a text file, an entry on each line") from error
    return {n: line for n, line in enumerate(lines, 1) if line.strip()}
