"""The programs: what is trained on a batch. One file each; `PROGRAMS` names them for the config key `program`."""

from ml_collections import ConfigDict

from pisces_jax.training.config import check_names
from pisces_jax.training.programs.base import Program
from pisces_jax.training.programs.decoder import DecoderProgram
from pisces_jax.training.programs.pretrain import PretrainProgram
from pisces_jax.training.programs.unified import UnifiedProgram
from pisces_jax.utils.errors import UserError

PROGRAMS: dict[str, type[Program]] = {
    "pretrain": PretrainProgram,
    "decoder": DecoderProgram,
    "unified": UnifiedProgram,
}


def program_class(config: ConfigDict) -> type[Program]:
    """The class of the program that a config names.

    Raises:
        UserError: an unknown program.
    """
    if config.program not in PROGRAMS:
        raise UserError(f"config key program: {config.program!r} is none of {', '.join(PROGRAMS)}")
    return PROGRAMS[config.program]


def make_program(config: ConfigDict, vocab_size: int) -> Program:
    """The program that a config names, for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: an unknown program, or settings that it lacks.
    """
    check_names(config)
    return program_class(config).from_config(config, vocab_size)
