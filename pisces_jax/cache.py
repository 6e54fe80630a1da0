"""Caches what the frozen encoders make of a config's pictures.

python -m pisces_jax.cache --config=configs/X.py[:stage] --workdir=DIR [--config.key=value ...]
"""

from pisces_jax.utils import cli, processes
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    rest, overrides = cli.split_overrides(cli.arguments())
    parser = cli.Parser(
        "cache",
        "Writes the generation encoder's pooled features of every picture that a stage draws, or learns to decode, and "
        "for a decoder that makes latents those of the autoencoder, sharded over processes. The same command "
        "continues what was interrupted. The stage then reads them with data.features set.",
        [
            "--config=configs/shapes.py:stage1 --workdir=runs/shapes",
            "--config=configs/mixed_small.py:stage1 --workdir=runs/mixed --dtype=float32 --batch_size=256",
            "--config=configs/pisces_8b/decoder.py --workdir=runs/pisces_8b",
        ],
    )
    parser.add_argument("--config", required=True, metavar="FILE:STAGE", help="a stage with a frozen encoder")
    parser.add_argument("--workdir", required=True, type=cli.path, metavar="DIR", help="where the encoder's run is")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--batch_size", type=cli.whole_number(1), default=64, help="pictures at a time (default 64)")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="that decode pictures (default 2)")
    cli.add_process_flags(parser)
    flags = parser.parse(rest)
    processes.start(flags.coordinator, flags.processes, flags.process, flags.meet_seconds, flags.silent_seconds)
    from pisces_jax.training.config_files import load_stages

    stages = load_stages(flags.config, overrides)
    if len(stages) > 1:
        raise UserError(f"--config={flags.config} has several stages: name one, such as :{list(stages)[-1]}")
    import jax

    from pisces_jax.training.feature_cache import cache_features
    from pisces_jax.training.tokenizer import entries_of

    cli.start()
    (config,) = stages.values()
    for sources in (config.data.train, config.data.evaluate):
        if not sources:
            continue
        with processes.primary_first("sources"):  # which may be indexed
            entries = entries_of(sources)
        share = jax.process_index(), jax.process_count()
        broken = cache_features(config, flags.workdir, entries, flags.dtype, flags.batch_size, flags.threads, share)
        for entry in entries if processes.primary() else ():
            if entry.name not in broken:
                cli.say(f"{entry.name}: its pictures are only read")
                continue
            words = f", {broken[entry.name]} of them not readable" if broken[entry.name] else ""
            cli.say(f"{entry.name}: features of {len(entry.source)} examples{words}")
    if processes.primary():
        cli.say(f"to train on them: --config.data.features={config.data.features or 'features'}")


if __name__ == "__main__":
    run_command(main)
