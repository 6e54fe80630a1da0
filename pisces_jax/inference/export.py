"""The parts of a finished run as folders of weights, each from the run that holds it."""

from pathlib import Path

from ml_collections import ConfigDict

from pisces_jax.inference.loading import find_run
from pisces_jax.models.lora import BASE, PART, merge
from pisces_jax.training.checkpoints import load_part
from pisces_jax.training.config import decoder_run, lora_config, part_settings
from pisces_jax.training.programs import program_class
from pisces_jax.training.run_folder import read_config
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.export import export_part, new_folder
from pisces_jax.weights.sources import is_folder


def export_run(
    workdir: Path, run: str, parts: list[str], dtype: str | None, out: Path, merged: bool = False
) -> None:  # fmt: skip
    """Writes `parts` (all that there are, if empty) of a run (the last unified one, if "") into folders below `out`.

    Args:
        merged: the run's adapters are multiplied out into its language model, in float32 or wider unless `dtype` says
            otherwise, and are no part by themselves.

    Raises:
        UserError: there are no adapters to merge, the run or a part of it does not exist, or `out` cannot be written.
    """
    run = run or find_run(workdir)
    config = read_config(workdir / run)
    where = _runs_of_parts(workdir, run, config)
    if merged and where.pop(PART, None) is None:
        raise UserError(f"--merge: {workdir / run} has no adapters (model.lora): leave it out")
    if unknown := [part for part in parts if part not in where]:
        raise UserError(f"--part={unknown[0]}: the parts of {workdir / run} are {', '.join(where)}")
    tokenizer = load_tokenizer(config, workdir)
    with new_folder(out) as scratch:
        for part in parts or where:
            settings = part_settings(read_config(workdir / where[part]), part, tokenizer.vocab_size)
            params = load_part(workdir, where[part], part)
            if merged and part == BASE and (lora := lora_config(config)) is not None:
                params = merge(params, load_part(workdir, run, PART), lora)
            beside = tokenizer if part == "language_model" else None
            family = export_part(scratch / part, part, settings, params, dtype=dtype, tokenizer=beside)
            cli.say(f"{part}: {family} layout, in {out / part}")


def _runs_of_parts(workdir: Path, run: str, config: ConfigDict) -> dict[str, str]:
    """For each part of a model, the run that it is taken from: its own, or the decoder's."""
    where: dict[str, str] = {}
    if (decoder := decoder_run(config)) and decoder != run and not is_folder(decoder):
        held = read_config(workdir / decoder)
        where |= dict.fromkeys(program_class(held).parts(held), decoder)
    return where | dict.fromkeys(program_class(config).parts(config), run)
