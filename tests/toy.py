"""A run that trains in milliseconds: three numbers, a closed-form loss, examples that are numbers. The loop is real.

python tests/toy.py --config=tests/toy.py --workdir=DIR ...     is `python -m pisces_jax.train` with it
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pisces_jax import sharding, train
from pisces_jax.data.packing.items import Items, Made
from pisces_jax.training import input, loop, stages
from pisces_jax.training.config import merge, run_config
from pisces_jax.training.programs.base import Program
from pisces_jax.utils.errors import run_command


@dataclasses.dataclass(frozen=True)
class Toy(Program):
    """Mean of |x w - y|²; an example whose x is NaN poisons its batch."""

    weights = {"fit": 1.0}

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls()

    @classmethod
    def parts(cls, config):
        return ("a",)

    def batch_spec(self, config):
        n = config.batch_size
        shapes = {"x": ((n, 3), jnp.float32), "y": ((n,), jnp.float32), "valid": ((n,), jnp.bool_)}
        return {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}

    def dataset(self, config, entries, tokenizer, caches, **how):
        raise NotImplementedError

    def forward_flops(self, spec):
        return {}

    def init(self, key):
        return {"a": {"w": jnp.arange(1.0, 4.0)}}

    def counts(self, batch):
        return {"fit": batch["valid"].sum().astype(jnp.float32)}

    def losses(self, params, batch, key):
        error = (batch["x"] @ params["a"]["w"] - batch["y"]) ** 2
        return {"fit": Average(total=error.sum(), count=batch["valid"].sum().astype(jnp.float32))}, {}


class Numbers(Items):
    """Item i of 64 in an epoch. Those of `poisoned` are NaN, those of `large` a thousand times too large; each takes
    `seconds` to make."""

    per_epoch, digest, left_out = 64, "00" * 8, {}

    def __init__(self, poisoned=(), large=(), seconds=0.0):
        self.poisoned, self.large, self.seconds = tuple(poisoned), tuple(large), seconds
        self.entries = [types.SimpleNamespace(name="numbers", source=Keys())]

    def verdicts(self, lengths):
        raise NotImplementedError

    def places(self, i):
        return [(0, i)]

    def make(self, i):
        time.sleep(self.seconds)
        rng = np.random.default_rng(i)
        x = rng.standard_normal(3).astype(np.float32) * np.float32(1000 if i in self.large else 1)
        if i in self.poisoned:
            x[:] = np.nan
        return Made({"x": x, "y": np.float32(rng.standard_normal()), "valid": np.asarray(True)}, 1, [])

    def empty(self):
        return {"x": np.zeros(3, np.float32), "y": np.float32(0), "valid": np.asarray(False)}


class Keys:
    def __getitem__(self, i):
        return types.SimpleNamespace(key=f"key{i}")


def config(**changes):
    settings = dict(
        name="toy", steps=12, batch_size=8,
        data=dict(train=dict(numbers=dict(seconds=0.0)), evaluate=dict(numbers={}), threads=0),
        optimizer=dict(learning_rate=0.05, warmup_steps=2, ema=0.9, param_groups=((".*", 1.0, 0.0),)),
        log=dict(every=1, evaluate_every=6, evaluate_batches=2, checkpoint_every=3),
    )  # fmt: skip
    made = run_config(**settings)
    merge(made, changes)
    return made


def get_config():
    return config()


@contextlib.contextmanager
def installed(devices=None):
    """Inside, `loop.train` runs the toy, whatever program the config names."""

    def items(config, tokenizer, program, workdir, sources, **how):
        return Numbers(**sources["numbers"].to_dict())

    tokenizer = types.SimpleNamespace(vocab_size=32, own_size=32)
    with contextlib.ExitStack() as patches:
        for where, name, value in (
            (input, "items", items),
            (loop, "load_tokenizer", lambda *a: tokenizer),
            (loop, "make_program", lambda *a: Toy()),
            (stages, "make_program", lambda *a: Toy()),
            (loop, "make_mesh", lambda **sizes: sharding.make_mesh(**sizes, devices=devices)),
        ):
            patches.enter_context(mock.patch.object(where, name, value))
        yield


if __name__ == "__main__":
    with installed():
        run_command(train.main)
