"""Which layer of a model is the first whose output is not finite: `train --debug_nans`."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pisces_jax.training import optimizer
from pisces_jax.training.programs.base import Batch
from pisces_jax.training.step import State, Trainer
from pisces_jax.utils.errors import listed


def first_not_finite(trainer: Trainer, state: State, batch: Batch) -> str:
    """Runs the forward pass again and names the first module whose output is infinite or NaN, as a sentence.

    A module counts when its call returns, so inner ones come before those that hold them. Where the forward pass is
    finite, the parameters are named whose gradients are not.
    """
    numbers = itertools.count()
    found: dict[int, tuple[str, list[bool]]] = {}  # by the order of the calls; layers of a scan share one

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        arrays = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
        if arrays:
            of: list[bool] = []
            name = "/".join(context.module.path) or type(context.module).__name__
            method = "" if context.method_name == "__call__" else f".{context.method_name}"
            found[next(numbers)] = name + method, of
            finite = jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()
            jax.debug.callback(lambda ok: of.append(bool(np.all(ok))), finite)
        return out

    with jax.set_mesh(trainer.mesh):
        with nn.intercept_methods(watch):
            jax.block_until_ready(trainer.forward(state, batch))
        jax.effects_barrier()
        for _, (name, of) in sorted(found.items()):
            if not all(of):
                layer = f", in its call {of.index(False) + 1} of {len(of)}" if len(of) > 1 else ""
                return f"the first module whose output is not finite is {name}{layer}"
        gradients = optimizer.flatten(trainer.gradient(state, batch))
    bad = [name for name, g in gradients.items() if not jnp.isfinite(g).all()]
    if bad:
        return f"the outputs of all modules are finite; the gradients of {listed(bad)} are not"
    return "the outputs of all modules and all gradients are finite: it is the loss, or the gradient's norm"
