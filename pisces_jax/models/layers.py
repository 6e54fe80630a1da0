"""Norms, projections, feed-forward layers, embeddings of positions and times: the layers of all models here.

Parameters are float32 when they are initialised; they are cast to a module's `dtype`, the compute dtype, when used.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pisces_jax.models.lora import LoRA, attach
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
    # What the forward pass of a block saves besides its input; the backward pass computes the rest again.
    "none": None,  # no rematerialisation: everything is saved
    "full": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_only_these_names("context"),  # results of attention: its kernel runs once
    "dots": _POLICIES.save_from_both_policies(  # and the results of all matrix products with weights
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("context")
    ),
    # As "attention", but what is saved is kept in the memory of the host, and so is the input of the block.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input", "context"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `module` with the given parameters by part; `method="name"` calls a method other than `__call__`."""
    return module.apply({"params": attach(params)}, *args, **kwargs)


def logical(init: nn.initializers.Initializer, *axes: str | None) -> Callable[..., Any]:
    """An initializer whose parameter has these logical axes (`sharding.RULES`)."""
    return nn.with_logical_partitioning(init, axes)


def lecun(fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """Normal with variance scale²/fan_in (LeCun et al. 1998), for kernels whose input has several axes."""
    return nn.initializers.normal(scale * fan_in**-0.5)


def scanned(block: type[nn.Module], length: int, in_axes: Sequence[Any], *, remat: str, unroll: bool) -> Any:
    """A module of `length` blocks in sequence, as one scan: parameters get a leading axis, and one block is compiled.

    Args:
        block: a module that maps `(x, *inputs)` to `(x, output)`.
        in_axes: for each input, 0 if it has a leading axis of layers, `nn.broadcast` if all layers get the same.
        remat: a key of `REMAT_POLICIES`.
        unroll: compiles all blocks one after the other, which is faster on CPUs; the results are the same.

    Raises:
        ValueError: the rematerialisation policy is unknown.
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
    """A linear map: contracts the last `len(in_axes)` axes of x with the kernel, and gives axes of `out_shape`.

    Attributes:
        in_axes, out_axes: logical axes of the kernel (`sharding.RULES`).
        scale: of the initial kernel, relative to variance 1/fan_in.
        lora: adapters of the model that this is in; it has one itself if its name is among their targets.
    """

    out_shape: Sequence[int]
    in_axes: Sequence[str | None]
    out_axes: Sequence[str | None]
    bias: bool = True
    scale: float = 1.0
    dtype: DType = jnp.float32
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = len(self.in_axes)
        in_shape = x.shape[-n:]
        init = logical(lecun(math.prod(in_shape), self.scale), *self.in_axes, *self.out_axes)
        kernel = self.param("kernel", init, (*in_shape, *self.out_shape))
        x = x.astype(self.dtype)
        y = project(x, kernel, tuple(self.in_axes), tuple(self.out_axes))
        if self.lora is not None and self.name in self.lora.targets:
            # Each factor lies as the kernel's side that it shares; where that is not over fsdp, its rank is.
            down, up = (None if "embed" in axes else "embed" for axes in (self.in_axes, self.out_axes))
            r = self.lora.rank
            a = self.param("lora_a", logical(lecun(math.prod(in_shape)), *self.in_axes, down), (*in_shape, r))
            b = self.param("lora_b", logical(nn.initializers.zeros, up, *self.out_axes), (r, *self.out_shape))
            narrow = project(x, a, tuple(self.in_axes), (down,))
            y = y + self.lora.scale * project(narrow, b, (up,), tuple(self.out_axes))
        if self.bias:
            init = logical(nn.initializers.zeros, *self.out_axes)
            y = y + self.param("bias", init, tuple(self.out_shape)).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467), in at least float32."""

    eps: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis (Ba et al. 2016, arXiv 1607.06450), in at least float32.

    Attributes:
        affine: whether there are a scale and a bias.
        start: initial value of the scale.
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
    """The feed-forward layer of transformer encoders: down(activation(up(x)))."""

    hidden: int
    activation: str = "gelu"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = Linear((self.hidden,), ("embed",), ("mlp",), dtype=self.dtype, name="up")(x)
        h = ACTIVATIONS[self.activation](h)
        return Linear((x.shape[-1],), ("mlp",), ("embed",), dtype=self.dtype, name="down")(h)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) without biases (Shazeer 2020, arXiv 2002.05202; LLaMA)."""

    hidden: int
    dtype: DType = jnp.float32
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        how: dict[str, Any] = dict(bias=False, dtype=self.dtype, lora=self.lora)

        def project(name: str) -> Array:
            return Linear((self.hidden,), ("embed",), ("mlp",), name=name, **how)(x)

        h = jax.nn.silu(project("gate")) * project("up")
        return Linear((x.shape[-1],), ("mlp",), ("embed",), name="down", **how)(h)


class Projector(nn.Module):
    """A two-layer MLP with GELU from one representation to another: from an encoder to the language model, and back.

    Attributes:
        grid: if not 0, the vectors form a square of that side, and learned embeddings of the row and column of the
            next place are added to each vector. The next place of the last vector is the first.
        scale: of the initial last matrix, relative to the usual one.
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
    """Cosines and sines of rotary angles, shared by all layers of a model. `unroll` as in `scanned`.

    With unrolled layers, XLA's CPU compiler would compute them again at each use, for every element and head: a third
    of the time of a small model's attention. A gather, even of all rows in order, makes it compute them once.
    """
    found = jnp.cos(angles), jnp.sin(angles)
    rows = jnp.arange(angles.shape[0])
    return (found[0][rows], found[1][rows]) if unroll else found


def apply_rope(x: Float[Array, "B T N H"], rope: CosSin) -> Float[Array, "B T N H"]:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864): rotates the pairs (x_i, x_{i+H/2}), in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (t[:, :, None].astype(wide) for t in rope)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def grid_angles(ys: Float[Array, "M"], xs: Float[Array, "M"], head_dim: int, base: float) -> Float[Array, "1 M Half"]:
    """Angles of a two-dimensional rotary embedding: half of the pairs rotate with y, half with x."""
    frequencies = base ** (-jnp.arange(0, head_dim // 2, 2) / (head_dim // 2))
    return jnp.concatenate([ys[:, None] * frequencies, xs[:, None] * frequencies], axis=-1)[None]


def grid_centres(side: int, scale: float = 1.0) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """(ys, xs) of the cell centres of a side×side grid in raster order; a cell is `scale` wide."""
    centres = (jnp.arange(side) + 0.5) * scale
    ys, xs = jnp.meshgrid(centres, centres, indexing="ij")
    return ys.reshape(-1), xs.reshape(-1)


def sinusoids(x: Float[Array, "*B"], width: int) -> Float[Array, "*B width"]:
    """Cosines, then sines, of numbers at frequencies from 1 down to 1/10,000 (Ho et al. 2020, arXiv 2006.11239)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angles = x[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def time_embedding(t: Float[Array, "B"], width: int) -> Float[Array, "B width"]:
    """The `sinusoids` of 1000·t, t in [0, 1]."""
    return sinusoids(1000.0 * t, width)


def pool_2d(x: Float[Array, "B N D"], stride: int) -> Float[Array, "B M D"]:
    """Averages stride×stride squares of a square grid in raster order (Pisces' Pool_{a×a}); M = N/stride².

    Raises:
        ValueError: N is not the square of a multiple of `stride`.
    """
    B, N, D = x.shape
    side = round(N**0.5)
    if side * side != N or side % stride:
        raise ValueError(f"{N} vectors are not a square grid whose side is a multiple of {stride}")
    x = x.reshape(B, side // stride, stride, side // stride, stride, D)
    return x.mean(axis=(2, 4)).reshape(B, -1, D)


def normalize_picture(
    images: Int[Array, "B S S 3"], mean: Sequence[float], std: Sequence[float], dtype: DType
) -> Float[Array, "B S S 3"]:
    """uint8 pixels to (x/255 − mean)/std in `dtype`, computed in at least float32."""
    wide = jnp.promote_types(dtype, jnp.float32)
    x = images.astype(wide) / 255.0
    return ((x - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


def patchify(images: Float[Array, "B S S C"], patch: int) -> Float[Array, "B N PPC"]:
    """Squares of patch×patch pixels in raster order; the order inside a patch is row, column, channel."""
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
