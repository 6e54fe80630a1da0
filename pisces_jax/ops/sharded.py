"""Products with parameters that are sharded over fsdp: parameters are all-gathered, gradients reduce-scattered.

The compiler alone would all-reduce the gradient of a weight and then slice it; over a whole TPU slice it does so even
to explicit reduce-scatters. So the backward pass is written out: each device multiplies its own rows, and the results
are reduce-scattered over fsdp's two mesh axes, one after the other, in the dtype of the computation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pisces_jax.sharding import BATCH_AXES, constrain, gathered, mesh_in_force, partition_spec, spec_axes

Axes = tuple[str | None, ...]
TABLE = ("vocab", "embed")  # of embeddings


def project(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], in_axes: Axes, out_axes: Axes
) -> Float[Array, "*B O"]:
    """Contracts the last `len(in_axes)` axes of x with the first of the kernel, in the dtype of x."""
    mesh = mesh_in_force()
    if mesh is None or not rows_divide(x, mesh):
        # With one leading axis, XLA's CPU compiler computes the gradient of the kernel twice as fast.
        n = len(in_axes)
        y = _project(x.reshape(-1, *x.shape[-n:]), kernel, in_axes, out_axes)
        return y.reshape(*x.shape[:-n], *y.shape[1:])
    return _project_sharded(x, kernel, in_axes, out_axes, mesh)


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """The rows of a table of embeddings (axes "vocab" and "embed") that belong to the tokens, in `dtype`."""
    mesh = mesh_in_force()
    with jax.named_scope("embedding"):
        if mesh is None or not rows_divide(tokens, mesh) or spec_axes(partition_spec(TABLE, table.shape, mesh), 0):
            return _look_up(table, tokens, dtype)
        return _look_up_sharded(table, tokens, dtype, mesh)


def rows_divide(x: Array, mesh: Any) -> bool:
    """Whether the first axis of x divides over all batch axes of the mesh."""
    return spec_axes(partition_spec(("batch",), x.shape[:1], mesh), 0) == batch_axes(mesh)


def reduce_scatter(stored: PartitionSpec, mesh: Any, dimensions: int) -> Callable[[Array], Array]:
    """A function for the inside of `shard_map`: sums a gradient over the batch axes, each device keeping its own part.

    Args:
        stored: the sharding of the parameter.
        dimensions: of the parameter.
    """
    scattered = [(d, axis) for d in range(dimensions) for axis in spec_axes(stored, d) if axis in BATCH_AXES]
    summed = tuple(a for a in batch_axes(mesh) if a not in {axis for _, axis in scattered})

    def reduce(gradient: Array) -> Array:
        for dimension, axis in scattered:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(gradient, summed) if summed else gradient

    return reduce


def batch_axes(mesh: Any) -> tuple[str, ...]:
    """The mesh axes over which batches are sharded and that have more than one device."""
    return tuple(a for a in BATCH_AXES if mesh.shape[a] > 1)


def _project(x: Array, kernel: Array, in_axes: Axes, out_axes: Axes) -> Array:
    n = len(in_axes)
    contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    kernel = gathered(kernel.astype(x.dtype), *in_axes, *out_axes)
    return jax.lax.dot_general(x, kernel, (contract, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project_sharded(x: Array, kernel: Array, in_axes: Axes, out_axes: Axes, mesh: Any) -> Array:
    return _project(x, kernel, in_axes, out_axes)


def _project_forward(x: Array, kernel: Array, in_axes: Axes, out_axes: Axes, mesh: Any) -> tuple[Array, Any]:
    return _project(x, kernel, in_axes, out_axes), (x, kernel)


def _project_backward(in_axes: Axes, out_axes: Axes, mesh: Any, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    n, m = len(in_axes), len(out_axes)
    leading = x.ndim - n
    whole = gathered(kernel.astype(x.dtype), *in_axes, *out_axes)
    dx = jax.lax.dot_general(dy, whole, ((tuple(range(leading, dy.ndim)), tuple(range(n, n + m))), ((), ())))

    stored = partition_spec((*in_axes, *out_axes), kernel.shape, mesh)
    reduce = reduce_scatter(stored, mesh, kernel.ndim)
    rows = [batch_axes(mesh) or None, *[None] * (leading - 1)]
    tensor = [tuple(a for a in spec_axes(stored, d) if a not in BATCH_AXES) or None for d in range(kernel.ndim)]

    def local(x: Array, dy: Array) -> Array:
        over = tuple(range(leading))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        gradient = jax.lax.dot_general(x, dy, ((over, over), ((), ())), preferred_element_type=wide)
        return reduce(gradient.astype(x.dtype))

    dw = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(*rows, *tensor[:n]), PartitionSpec(*rows, *tensor[n:])),
        out_specs=stored, check_vma=False,
    )(x, dy)  # fmt: skip
    return dx, dw.astype(kernel.dtype)


_project_sharded.defvjp(_project_forward, _project_backward)


def _look_up(table: Array, tokens: Array, dtype: Any) -> Array:
    # The table is gathered over fsdp first. If it stayed sharded by width, every device would have to hold the vectors
    # of the whole batch.
    return constrain(gathered(table.astype(dtype), *TABLE)[tokens], "batch", "length", "width")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up_sharded(table: Array, tokens: Array, dtype: Any, mesh: Any) -> Array:
    return _look_up(table, tokens, dtype)


def _look_up_forward(table: Array, tokens: Array, dtype: Any, mesh: Any) -> tuple[Array, Any]:
    return _look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype: Any, mesh: Any, saved: Any, dx: Array) -> tuple[Array, None]:
    table, tokens = saved
    stored = partition_spec(TABLE, table.shape, mesh)
    reduce = reduce_scatter(stored, mesh, 2)

    def local(tokens: Array, dx: Array) -> Array:
        # In float32, because frequent tokens are sums of many terms.
        wide = jnp.promote_types(dtype, jnp.float32)
        return reduce(jnp.zeros(table.shape, wide).at[tokens].add(dx.astype(wide)).astype(dtype))

    rows = batch_axes(mesh) or None
    gradient = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(rows, None), PartitionSpec(rows, None, None)), out_specs=stored,
        check_vma=False,
    )(tokens, dx)  # fmt: skip
    return gradient.astype(table.dtype), None


_look_up_sharded.defvjp(_look_up_forward, _look_up_backward)
