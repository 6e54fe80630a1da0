"""What a config holds: every key with its default, once; and from its values to the settings of the parts.

A file under `configs/` defines `get_config()`, which returns `run_config(...)` with the values of one run, or a
`ConfigDict` whose `stages` are several such runs.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from pisces_jax.data.instructions import DRAW_INSTRUCTION
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.denoiser import DenoiserConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.layers import REMAT_POLICIES
from pisces_jax.models.lora import LoRA
from pisces_jax.models.pisces import PiscesConfig
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.models.vit import TextTowerConfig, ViTConfig
from pisces_jax.ops.attention import BACKENDS
from pisces_jax.utils.errors import UserError

T = TypeVar("T")


def run_config(**changes: Any) -> ConfigDict:
    """One run with every key it may have; `changes` are merged over the defaults (`merge`).

    Raises:
        UserError: a key that does not exist; the message names the nearest.
    """
    config = ConfigDict(
        dict(
            name="",  # the run's folder below --workdir
            program="unified",  # pretrain, decoder or unified (training/programs/)
            seed=0,
            steps=1000,
            profile=0,  # steps to trace, after the first few, into the run's folder `profile` (TensorBoard, Perfetto)
            batch_size=1,  # rows (unified) or pictures (pretrain, decoder), over all devices
            compute_dtype="float32",
            # Part of the model -> its settings (the dataclasses of models/): what the program needs and no more.
            model=ConfigDict(),
            # Part -> the run below --workdir whose weights it starts from, or a folder of published weights
            # (docs/weights.md); parts that are not named start from random numbers.
            init_from=ConfigDict(),
            # Part -> dtype of its stored parameters; float32 for parts that are not named.
            param_dtype=ConfigDict(),
            # unified: the run whose decoder turns its vectors into pictures, or a folder with Emu2-Gen's: `unet/`,
            # `vae/` and `scheduler/` (docs/blip3o.md).
            decoder="",
            # unified: train the decoder in this run too, from the vectors as they are predicted (loss.reconstruction,
            # loss.true_vectors); it then draws with its own decoder.
            train_decoder=False,
            data=dict(
                # A file below --workdir, or (with a separator in its name, or hf://) a folder with a published one.
                tokenizer="tokenizer.model",
                # A tokenizer that is trained if the file is not there: number of pieces, the sources whose texts it
                # sees, and how many examples of each. It serves every run of the work directory, so name what all of
                # them read and write; with no sources named it sees those of `train`.
                tokenizer_vocabulary=0,
                tokenizer_sources=ConfigDict(),
                tokenizer_examples=2000,
                tokenizer_casefold=False,  # it takes capitals for small letters
                train=ConfigDict(),  # name -> source (docs/data.md)
                evaluate=ConfigDict(),
                # Further held-out sources that `evaluate --task=judge` draws from; training never reads them.
                judge=ConfigDict(),
                examples_per_epoch=0,  # 0: as many as the sources hold
                threads=2,
                workers=0,  # processes; 0: threads alone
                # Folder below --workdir with cached features of the pictures (`pisces_jax.cache`); "": none.
                features="",
                max_broken=0.01,  # share of broken examples above which a run stops
                leave_out=(),  # steps whose batches are passed over: each counts as a step that changes nothing
                scaled_jpeg=False,  # decode JPEGs no larger than needed: faster, not exact to the pixel
                row_length=256,
                # Rows that share one pool of pictures; batch_size is a multiple of it. The more, the fewer idle slots.
                rows_per_pool=1,
                read_slots=0,  # pictures to read in a pool
                draw_slots=0,  # pictures to draw in a pool
                read_stretch=False,  # pictures to read are stretched to a square (SigLIP), not cropped
                text_length=64,  # pretrain, decoder: longest text, in tokens
            ),
            loss=dict(
                text=1.0,
                vectors=1.0,
                vector_error="mse",  # of the regression head: "mse", or "cosine" (MetaMorph)
                flow_samples=1,  # of the flow heads: times and noises per picture, or vector, and step
                contrastive=1.0,
                # pretrain: "sigmoid" (SigLIP), or "softmax" (CLIP), with which small batches learn finer things.
                contrast="sigmoid",
                # pretrain: pictures of the same text are positives too: for class labels and names that repeat.
                same_text=False,
                reconstruction=1.0,
                chunk=0,  # entries of the vocabulary whose logits exist at a time; 0: all
                # For small models trained from scratch (configs/shapes.py):
                # pretrain: the understanding encoder's vectors also predict the caption's words, at this weight.
                words=0.0,
                # Standard deviation of Gaussian noise on the features that the decoder is conditioned on.
                feature_noise=0.0,
                # The same on the drawn vectors that are fed to the language model, whose own will not be exact.
                fed_noise=0.0,
                # With `train_decoder`: share of the pictures of which the decoder is given the true vectors in place of
                # those predicted.
                true_vectors=0.3,
            ),
            flow=dataclasses.asdict(FlowConfig()),  # of the decoder
            vector_flow=dataclasses.asdict(FlowConfig()),  # of the flow head (model.generator or model.denoiser)
            optimizer=dict(
                learning_rate=1e-3,
                warmup_steps=0,
                final_rate=0.0,  # share of learning_rate at the end of the cosine
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                clip=1.0,  # global norm of the gradient
                grad_accum_steps=1,  # the batch is taken in so many equal parts; the gradient is the whole batch's
                ema=0.0,  # decay of the averaged weights, which later runs and inference use; 0: none
                mu_dtype="float32",  # of the first moments; the second have the parameters'
                # How parameters and moments in bfloat16 are rounded: "nearest", which loses small changes, or
                # "stochastic", which keeps them in the mean.
                rounding="nearest",
                grad_dtype="",  # "": the parameters'; sums over accumulation steps are in the parameters'
                # (pattern over parameter names, input axes, output axes): matrices that Muon updates instead of AdamW.
                muon=(),
                # (pattern over parameter names, multiple of the learning rate, weight decay): the first that matches
                # applies; a multiple of 0 freezes.
                param_groups=((r".*/(scale|bias|gate|[a-z_]*embedding)", 1.0, 0.0), (".*", 1.0, 0.0)),
            ),
            # How a finished run draws unless a command says otherwise: with a description of its own written first
            # (at most `max_tokens`, sampled at `temperature`), or at once. The prompt stands at {} in `instruction`,
            # which is the one of its recipes (docs/data.md).
            sampling=dict(describe=False, max_tokens=96, temperature=1.0, instruction=DRAW_INSTRUCTION),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            log=dict(
                every=50,
                evaluate_every=0,
                evaluate_batches=4,
                checkpoint_every=0,  # 0: at the end alone
                keep=2,  # the last checkpoints; where the newest is damaged, the run goes on from the one before
                keep_every=0,  # checkpoints of multiples of so many steps stay too; 0: none
                keep_best="",  # a name in metrics.jsonl, as val/text: the checkpoint with its lowest value stays too
                samples_every=0,
                samples=8,
                tensorboard=False,
            ),
            # What a run puts up with (docs/reliability.md).
            limits=dict(
                # Steps in a row that are skipped, because a loss or the gradient is infinite or NaN, after which the
                # run goes back to its last checkpoint, and stops the next time. 0: it never does.
                bad_steps=10,
                spike=0.0,  # a loss of so many times the median of its line of the log is recorded; 0: none is
                step_seconds=3600.0,  # a step that takes longer ends the run as stuck; 0: never
                save_seconds=600.0,  # a save that takes longer has failed
                failed_saves=3,  # in a row, after which the run stops
            ),
            # For small models on CPUs: XLA's own matrix products in place of YNNPACK's, 0.85 of a step's time on two
            # cores; sums are rounded otherwise.
            plain_products=False,
        )
    )
    merge(config, changes)
    return config


DTYPES = ("float32", "bfloat16", "float16", "float64")

# Keys whose subkeys are the user's own: any name may stand there.
OPEN_KEYS = ("model", "init_from", "param_dtype", "train", "evaluate", "judge", "tokenizer_sources", "stages")


def merge(config: ConfigDict, changes: Mapping[str, Any], prefix: str = "") -> None:
    """Sets `changes` in `config`, key by key; what stands at one of `OPEN_KEYS` is replaced as a whole.

    Raises:
        UserError: a key that does not exist; the message names the nearest.
    """
    for key, value in changes.items():
        if key not in config:
            near = difflib.get_close_matches(key, list(config), 1, 0.0)
            raise UserError(f"config key {prefix}{key} does not exist: did you mean {near[0]}?")
        if key in OPEN_KEYS:
            config[key] = ConfigDict(value)
        elif isinstance(config[key], ConfigDict) and isinstance(value, Mapping):
            merge(config[key], value, f"{prefix}{key}.")
        else:
            config[key] = value


def build(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A dataclass of settings from a config's mapping.

    Raises:
        UserError: a key that the dataclass lacks (names the nearest), one that is missing, or a value it refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = dict(settings)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, list(fields), 1, 0.0)
            raise UserError(f"config key {where}.{key} does not exist: did you mean {near[0]}?")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"config key {where}.{missing[0]} is missing: set it")
    if values.get("rope_scaling") is not None and "rope_scaling" in values:
        values["rope_scaling"] = build(RopeScaling, values["rope_scaling"], f"{where}.rope_scaling")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"config {where}: {error}") from error


def check_names(config: ConfigDict) -> None:
    """Checks the names of dtypes, rematerialisation policies and attention backends.

    Raises:
        UserError: one does not exist; the message lists those that do.
    """
    o = config.optimizer
    named = {"compute_dtype": config.compute_dtype, "optimizer.mu_dtype": o.mu_dtype}
    named |= {"optimizer.grad_dtype": o.grad_dtype} if o.grad_dtype else {}
    named |= {f"param_dtype.{part}": dtype for part, dtype in config.param_dtype.items()}
    choices: list[tuple[str, Any, tuple[str, ...]]] = [(key, value, DTYPES) for key, value in named.items()]
    choices.append(("optimizer.rounding", o.rounding, ("nearest", "stochastic")))
    for part, settings in config.model.items():
        for key, known in (("remat", tuple(REMAT_POLICIES)), ("attention", BACKENDS)):
            if isinstance(settings, ConfigDict) and key in settings:
                choices.append((f"model.{part}.{key}", settings[key], known))
    for key, value, known in choices:
        if value not in known:
            raise UserError(f"config key {key}: {value!r} is none of {', '.join(known)}")


def _part(config: ConfigDict, part: str) -> Mapping[str, Any]:
    if part not in config.model:
        raise UserError(f"config key model.{part} is missing: program {config.program!r} needs that part")
    return config.model[part]


def vit_config(config: ConfigDict, part: str) -> ViTConfig:
    return build(ViTConfig, _part(config, part), f"model.{part}")


def autoencoder_config(config: ConfigDict) -> AutoencoderConfig | None:
    """The autoencoder's settings; None where the decoder makes pixels."""
    if "autoencoder" not in config.model:
        return None
    return build(AutoencoderConfig, config.model.autoencoder, "model.autoencoder")


def dit_config(config: ConfigDict) -> DiTConfig:
    """The decoder's settings; the size of its condition follows from the generation encoder and the pooling."""
    encoder = vit_config(config, "generation_encoder")
    settings = dict(_part(config, "decoder"))
    settings["condition_width"] = encoder.output_width
    settings["condition_vectors"] = encoder.vectors // config.model.pool**2
    return build(DiTConfig, settings, "model.decoder")


def generator_config(config: ConfigDict, width: int) -> DiTConfig:
    """The flow head's settings; what it makes and its condition follow from the encoder, the pooling and the language
    model's width.

    Raises:
        UserError: the drawn vectors are no square, or the config sets what follows.
    """
    encoder = vit_config(config, "generation_encoder")
    vectors = encoder.vectors // config.model.pool**2
    side = math.isqrt(vectors)
    derived = dict(
        size=side, patch_size=1, channels=encoder.output_width, condition_width=width, condition_vectors=vectors
    )
    given = _with_derived(config, "generator", derived)
    if side**2 != vectors:
        raise UserError(
            f"model.generator makes a square map and the generation encoder gives {vectors} pooled vectors: choose its "
            "image_size, patch_size and model.pool so that they are a square"
        )
    return build(DiTConfig, given, "model.generator")


def denoiser_config(config: ConfigDict, width: int) -> DenoiserConfig:
    """The settings of the flow of each vector; its vectors are the generation encoder's, its condition the states.

    Raises:
        UserError: the config sets what follows.
    """
    derived = dict(channels=vit_config(config, "generation_encoder").output_width, condition_width=width)
    return build(DenoiserConfig, _with_derived(config, "denoiser", derived), "model.denoiser")


def _with_derived(config: ConfigDict, part: str, derived: Mapping[str, int]) -> dict[str, Any]:
    """A part's settings with those that follow from the encoder and the language model."""
    given = _part(config, part)
    for key in derived:
        if key in given:
            raise UserError(f"config key model.{part}.{key} follows from the generation encoder: leave it out")
    return {**given, **derived}


def vector_flow_config(config: ConfigDict) -> FlowConfig:
    return build(FlowConfig, config.vector_flow, "vector_flow")


def decoder_run(config: ConfigDict) -> str:
    """The run that has the decoder of a unified run: itself, where it trains the decoder; "": none."""
    return config.name if config.train_decoder else config.decoder


def transformer_config(config: ConfigDict, vocab_size: int) -> TransformerConfig:
    language = {**_part(config, "language_model"), "vocab_size": vocab_size}
    return build(TransformerConfig, language, "model.language_model")


def lora_config(config: ConfigDict, base: TransformerConfig | None = None) -> LoRA | None:
    """The settings of the language model's adapters, `model.lora`; None without any."""
    if "lora" not in config.model:
        return None
    return dataclasses.replace(build(LoRA, config.model.lora, "model.lora"), base=base)


def part_settings(config: ConfigDict, part: str, vocab_size: int) -> Any:
    """The settings of one part as its module takes them; None for projectors and heads."""
    if part == "language_model":
        return transformer_config(config, vocab_size)
    if part == "lora":
        return lora_config(config, transformer_config(config, vocab_size))
    if part in ("understanding_encoder", "generation_encoder"):
        return vit_config(config, part)
    if part in ("generator", "denoiser"):
        make = generator_config if part == "generator" else denoiser_config
        return make(config, transformer_config(config, vocab_size).width)
    return {"decoder": dit_config, "autoencoder": autoencoder_config}.get(part, lambda _: None)(config)


def pisces_config(config: ConfigDict, vocab_size: int) -> PiscesConfig:
    """The unified model's settings; a config whose model has no encoder is a language model alone, and one without the
    understanding encoder draws but reads no pictures."""
    language_model = dataclasses.replace(transformer_config(config, vocab_size), lora=lora_config(config))
    if not {"understanding_encoder", "generation_encoder"} & set(config.model):
        return PiscesConfig(language_model)
    reads, generator, denoiser = (k in config.model for k in ("understanding_encoder", "generator", "denoiser"))
    place_embedding = config.model.get("place_embedding", False)
    fed_vectors = config.model.get("fed_vectors", True)
    hidden = _part(config, "hidden") if reads or fed_vectors or not generator else {}
    if generator and place_embedding:
        raise UserError("model.generator draws all vectors at once, so model.place_embedding has no use: leave it out")
    if (generator or denoiser) and "vector_head" in hidden:
        head = "generator" if generator else "denoiser"
        raise UserError(f"model.{head} is the vector head, and model.hidden.vector_head is of regression: leave it out")
    if not (generator or place_embedding or fed_vectors):
        raise UserError("model.fed_vectors=False needs model.place_embedding=True, to tell drawn vectors apart")
    try:
        return PiscesConfig(
            language_model=language_model,
            understanding_encoder=vit_config(config, "understanding_encoder") if reads else None,
            generation_encoder=vit_config(config, "generation_encoder"),
            pool=config.model.pool,
            projector_hidden=hidden.get("projector", 0),
            vector_head_hidden=0 if generator or denoiser else hidden["vector_head"],
            generator=generator_config(config, language_model.width) if generator else None,
            denoiser=denoiser_config(config, language_model.width) if denoiser else None,
            standardise=config.model.get("standardise", False),
            place_embedding=place_embedding,
            fed_vectors=fed_vectors,
        )
    except ValueError as error:
        raise UserError(f"config model: {error}") from error


def text_tower_config(config: ConfigDict, vocab_size: int) -> TextTowerConfig:
    settings = {**_part(config, "text_tower"), "vocab_size": vocab_size, "max_length": config.data.text_length}
    return build(TextTowerConfig, settings, "model.text_tower")


def flow_config(config: ConfigDict) -> FlowConfig:
    return build(FlowConfig, config.flow, "flow")


def in_order(stages: Mapping[str, ConfigDict]) -> dict[str, ConfigDict]:
    """Stages in an order in which each comes after those whose weights it takes (a `ConfigDict` keeps no order).

    Raises:
        UserError: stages that depend on one another in a circle.
    """
    waiting, ordered = dict(stages), dict[str, ConfigDict]()
    while waiting:
        names = {config.name for config in waiting.values()}
        ready = [s for s, c in waiting.items() if not names & {*c.init_from.values(), c.decoder} - {c.name}]
        if not ready:
            raise UserError(f"stages {', '.join(waiting)} need one another's weights: fix init_from and decoder")
        ordered[ready[0]] = waiting.pop(ready[0])
    return ordered
