"""Flags of the commands that draw, and what a run's config says where they are silent."""

import argparse
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.utils.cli import Parser, number


def add_drawing_flags(parser: Parser) -> None:
    """How to draw; what is not given is as the run's config says."""
    parser.add_argument(
        "--describe", action="store_true", default=None, help="let the model write a description of its own first"
    )
    parser.add_argument("--nodescribe", action="store_false", dest="describe", help="draw at once")
    parser.add_argument("--temperature", type=number(0), help="of the descriptions; 0: the likeliest words")
    parser.add_argument("--guidance", type=number(0), help="of the decoder; 1 is none")


def drawing_choice(given: argparse.Namespace | None, config: ConfigDict) -> dict[str, Any]:
    """Arguments of `Model.draw`, from the flags and where they are silent from the run's config."""
    chosen = config.sampling
    flag = {name: getattr(given, name, None) for name in ("describe", "temperature", "guidance")}
    return {
        "describe": chosen.describe if flag["describe"] is None else flag["describe"],
        "max_tokens": chosen.max_tokens,
        "temperature": chosen.temperature if flag["temperature"] is None else flag["temperature"],
        "guidance": flag["guidance"],
    }
