"""Norms, projections, feed-forward layers, rotary and time embeddings: what every model here is made of.

Every parameter is float32 at initialisation and is cast to the module's compute dtype where it is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pisces_jax.ops.sharded import project

DType = Any
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "silu": jax.nn.silu,
}
_POLICIES = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Any] = {
    # What the backward pass of a block finds saved beside the block's input; the rest is computed again.
    "none": None,  # no rematerialisation
    "full": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_only_these_names("context"),  # attention's results: its kernel runs forward once
    "dots": _POLICIES.save_from_both_policies(  # the outputs of all matrix products with weights, too
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("context")
    ),
    # Like "attention", but what is saved, the block's input with it, waits in the host's memory.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input", "context"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module` on arrays, given its parameters; `method="name"` calls another method than `__call__`."""
    return module.apply({"params": params}, *args, **kwargs)


def logical(init: nn.initializers.Initializer, *axes: str | None) -> Callable[..., Any]:
    return nn.with_logical_partitioning(init, axes)


def lecun(fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """Normal with variance scale²/fan_in: written out since kernels here have split axes."""
    return nn.initializers.normal(scale * fan_in**-0.5)


def scanned(block: type[nn.Module], length: int, in_axes: Sequence[Any], *, remat: str, unroll: bool) -> Any:
    """The module of `length` blocks run as one scan: parameters get a leading axis, the compiler sees one block.

    A block maps `(x, *inputs)` to `(x, output)`; `in_axes` says of each input whether it has a leading axis of layers
    (0) or is the same for all (`nn.broadcast`). `unroll` writes the loop out, faster on CPU, with the same numbers.

    Raises:
        ValueError: an unknown rematerialisation policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"unknown rematerialisation policy {remat!r}; known: {', '.join(REMAT_POLICIES)}")
    if REMAT_POLICIES[remat] is not None:
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=length,
        unroll=length if unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Linear(nn.Module):
    """x Wᵀ + b with named axes: contracts the last `len(in_axes)` axes of x, gives `out_shape`."""

    out_shape: Sequence[int]
    in_axes: Sequence[str | None]
    out_axes: Sequence[str | None]
    bias: bool = True
    scale: float = 1.0
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = len(self.in_axes)
        in_shape = x.shape[-n:]
        fan_in = 1
        for d in in_shape:
            fan_in *= d
        shape = (*in_shape, *self.out_shape)
        kernel = self.param("kernel", logical(lecun(fan_in, self.scale), *self.in_axes, *self.out_axes), shape)
        y = project(x.astype(self.dtype), kernel, tuple(self.in_axes), tuple(self.out_axes))
        if self.bias:
            y = y + self.param("bias", logical(nn.initializers.zeros, *self.out_axes), tuple(self.out_shape)).astype(
                self.dtype
            )
        return y


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (Zhang & Sennrich 2019), in at least float32."""

    eps: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, in at least float32; `affine=False`: neither.

    The scale starts at `start`.
    """

    eps: float = 1e-6
    affine: bool = True
    start: float = 1.0
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            init = nn.initializers.constant(self.start)
            wide = wide * self.param("scale", logical(init, "norm"), (x.shape[-1],))
            wide = wide + self.param("bias", logical(nn.initializers.zeros, "norm"), (x.shape[-1],))
        return wide.astype(self.dtype)


class MLP(nn.Module):
    """Two layers with an activation between (transformer encoders)."""

    hidden: int
    activation: str = "gelu"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = Linear((self.hidden,), ("embed",), ("mlp",), dtype=self.dtype, name="up")(x)
        h = ACTIVATIONS[self.activation](h)
        return Linear((x.shape[-1],), ("mlp",), ("embed",), dtype=self.dtype, name="down")(h)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases (Shazeer 2020; LLaMA)."""

    hidden: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def project(name: str) -> Array:
            return Linear((self.hidden,), ("embed",), ("mlp",), bias=False, dtype=self.dtype, name=name)(x)

        h = jax.nn.silu(project("gate")) * project("up")
        return Linear((x.shape[-1],), ("mlp",), ("embed",), bias=False, dtype=self.dtype, name="down")(h)


class Projector(nn.Module):
    """The two-layer GELU MLP from one representation to another: encoder to language model, and back.

    With a `grid`, the side of the square that the vectors form, it adds learned embeddings of the row and the column
    of the place after each vector's own, which is the one to come; behind the last stands the first. `scale` is the
    last matrix's at the start, over the usual one.
    """

    width: int
    hidden: int
    dtype: DType = jnp.float32
    grid: int = 0
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"], place: Int[Array, "m"] | None = None) -> Float[Array, "*B D"]:
        h = Linear((self.hidden,), ("embed",), ("mlp",), dtype=self.dtype, name="up")(x)
        h = ACTIVATIONS["gelu"](h)
        y = Linear((self.width,), ("mlp",), ("embed",), scale=self.scale, dtype=self.dtype, name="down")(h)
        if self.grid:
            assert place is not None
            init = logical(nn.initializers.normal(0.35), "position", "embed")
            rows = self.param("row_embedding", init, (self.grid, self.width)).astype(y.dtype)
            columns = self.param("column_embedding", init, (self.grid, self.width)).astype(y.dtype)
            row, column = jnp.divmod((place + 1) % self.grid**2, self.grid)
            y = y + rows[row] + columns[column]
        return y


CosSin = tuple[Float[Array, "#B T Half"], Float[Array, "#B T Half"]]


def cos_sin(angles: Float[Array, "#B T Half"], unroll: bool = False) -> CosSin:
    """Cosines and sines of rotary angles, for all layers of a model; `unroll` says that these are written out.

    XLA's CPU compiler would then compute them again at each use, once an element and head: a third of a small model's
    attention. The operand of a gather it computes beforehand, even of one that takes every row as it is.
    """
    found = jnp.cos(angles), jnp.sin(angles)
    rows = jnp.arange(angles.shape[0])
    return (found[0][rows], found[1][rows]) if unroll else found


def apply_rope(x: Float[Array, "B T N H"], rope: CosSin) -> Float[Array, "B T N H"]:
    """Rotary embedding (Su et al. 2021): pairs (x_i, x_{i+H/2}) turned, in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (t[:, :, None].astype(wide) for t in rope)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def grid_angles(ys: Float[Array, "M"], xs: Float[Array, "M"], head_dim: int, base: float) -> Float[Array, "1 M Half"]:
    """Angles of a two-dimensional rotary embedding: half of the frequencies turn with y, half with x."""
    frequencies = base ** (-jnp.arange(0, head_dim // 2, 2) / (head_dim // 2))
    return jnp.concatenate([ys[:, None] * frequencies, xs[:, None] * frequencies], axis=-1)[None]


def grid_centres(side: int, scale: float = 1.0) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """(ys, xs) of the cell centres of a side×side grid in raster order, in units of `scale` a cell."""
    centres = (jnp.arange(side) + 0.5) * scale
    ys, xs = jnp.meshgrid(centres, centres, indexing="ij")
    return ys.reshape(-1), xs.reshape(-1)


def time_embedding(t: Float[Array, "B"], width: int, max_period: float = 10_000.0) -> Float[Array, "B width"]:
    """Sinusoids of 1000·t, t in [0, 1] (Ho et al. 2020)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / half)
    angles = 1000.0 * t[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def pool_2d(x: Float[Array, "B N D"], stride: int) -> Float[Array, "B M D"]:
    """Average over stride×stride squares of a square grid in raster order (Pisces' Pool_{a×a}); M = N/stride²."""
    B, N, D = x.shape
    side = round(N**0.5)
    if side * side != N or side % stride:
        raise ValueError(f"{N} vectors are no square grid whose side is a multiple of {stride}")
    x = x.reshape(B, side // stride, stride, side // stride, stride, D)
    return x.mean(axis=(2, 4)).reshape(B, -1, D)


def normalize_picture(
    images: Int[Array, "B S S 3"], mean: Sequence[float], std: Sequence[float], dtype: DType
) -> Float[Array, "B S S 3"]:
    """uint8 pixels to (x/255 − mean)/std, as the encoders expect them; computed in at least float32."""
    wide = jnp.promote_types(dtype, jnp.float32)
    x = images.astype(wide) / 255.0
    return ((x - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


def patchify(images: Float[Array, "B S S C"], patch: int) -> Float[Array, "B N PPC"]:
    """Squares of patch×patch pixels in raster order; inside one: row, column, channel."""
    B, S, _, C = images.shape
    n = S // patch
    x = images.reshape(B, n, patch, n, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, n * n, patch * patch * C)


def unpatchify(patches: Float[Array, "B N PPC"], patch: int) -> Float[Array, "B S S C"]:
    """The inverse of `patchify`."""
    B, N, D = patches.shape
    n, C = round(N**0.5), D // patch**2
    x = patches.reshape(B, n, n, patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, n * patch, n * patch, C)
