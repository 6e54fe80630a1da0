"""The mesh, and the table that maps logical axes to mesh axes.

Every parameter names its logical axes where it is declared (`models/`), and `RULES` says over which mesh axes each
logical axis is sharded. A dimension that its mesh axes do not divide is sharded over as many of them, in order, as
divide it, or replicated, and a `Fallback` records that.

Users give three sizes: `data`, `fsdp` and `tensor`. Internally `fsdp` is two mesh axes. Over a single axis that spans
a whole TPU slice, the compiler turns the reduction of gradients into all-reduces; over two axes, into
reduce-scatters, which send half the bytes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pisces_jax.utils.errors import UserError

MESH_AXES = ("data", "fsdp", "fsdp_inner", "tensor")
_FSDP = ("fsdp", "fsdp_inner")
BATCH_AXES = ("data", *_FSDP)
_AUTO = (AxisType.Auto,) * len(MESH_AXES)

# Parameters: the width of the model over fsdp, so that every matrix is sharded there once, whatever its other axis; the
# other axis (heads, hidden units, vocabulary) over tensor. Activations: rows over data and fsdp, because fsdp is data
# parallelism with sharded parameters; heads, hidden units and vocabulary over tensor; the width is not sharded.
RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": _FSDP,
    "embed_half": _FSDP[:1],  # a parameter that is gathered over one of fsdp's two axes
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "layers": (),
    "position": (),
    "patch": (),
    "embed_out": (),  # the output axis of a matrix whose both axes are the width
    "features": (),
    "modulation": (),
    "batch": BATCH_AXES,
    "length": (),
    "stream": ("tensor",),  # positions of the residual stream, which is saved for the backward pass
    "width": (),
}


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A dimension that is not sharded as `RULES` says: of the `wanted` mesh axes, only `used` divide its size."""

    name: str
    dimension: int
    size: int
    wanted: tuple[str, ...]
    used: tuple[str, ...]

    def __str__(self) -> str:
        used, wanted = "+".join(self.used) or "no mesh axis", "+".join(self.wanted)
        return f"{self.name}: dimension {self.dimension} of size {self.size} lies on {used}, not {wanted}"


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of `devices`. One size may be -1: it becomes what the other two leave.

    Raises:
        UserError: the product of the sizes is not the number of devices; the message names sizes that fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    total = len(devices)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {_show(sizes)}: sizes are positive, and at most one of them is -1")
    rest = math.prod(size for size in sizes.values() if size != -1)
    if free and total % rest == 0:
        sizes[free[0]] = total // rest
    elif free or rest != total:
        fits = {**sizes, "data": 1, "tensor": math.gcd(max(tensor, 1), total)}
        fits["fsdp"] = total // fits["tensor"]
        raise UserError(
            f"mesh {_show(sizes)} takes {'a multiple of ' if free else ''}{rest} devices and there are {total}: "
            f"try {_show(fits)}"
        )
    return Mesh(_lay_out(devices, _mesh_shape(**sizes)), MESH_AXES, axis_types=_AUTO)


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of these sizes (none of them -1) without devices: enough to compute shardings."""
    return AbstractMesh(_mesh_shape(data, fsdp, tensor), MESH_AXES, axis_types=_AUTO)


def _mesh_shape(data: int, fsdp: int, tensor: int) -> tuple[int, ...]:
    """The sizes of `MESH_AXES`: the second axis of fsdp is 4 or 2 where that leaves more than 1 for the first."""
    inner = next(n for n in (4, 2, 1) if fsdp % n == 0 and (n == 1 or fsdp > n))
    return data, fsdp // inner, inner, tensor


def _lay_out(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of that shape.

    On TPUs, neighbours in the array are neighbours in the slice's network, and different slices differ in `data`.

    Raises:
        UserError: there are several slices, and `data` is not a multiple of their number.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"mesh data={shape[0]} over {slices} slices: make data a multiple of {slices}")
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )  # fmt: skip


def user_mesh(mesh: Any) -> dict[str, int]:
    """The sizes of a mesh as the user gives them: `data`, `fsdp` (one number) and `tensor`."""
    return {
        "data": mesh.shape["data"], "fsdp": mesh.shape["fsdp"] * mesh.shape["fsdp_inner"],
        "tensor": mesh.shape["tensor"],
    }  # fmt: skip


def _show(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any, *, name: str = "", fallbacks: list | None = None
) -> PartitionSpec:
    """How an array with these logical axes is sharded on `mesh`, by `RULES`.

    Args:
        axes: the logical axis of each dimension; None is never sharded.
        mesh: concrete or abstract.
        name: of the array, for messages.
        fallbacks: a list that gets a `Fallback` for each dimension that its mesh axes do not divide.

    Raises:
        ValueError: an axis is unknown, two of them want one mesh axis, or their number is not that of the dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name or 'array'}: axes {tuple(axes)} do not name the dimensions of {tuple(shape)}")
    taken: dict[str, str] = {}
    entries: list[Any] = []
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{name or 'array'}: unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        wanted = tuple(a for a in RULES[axis] if mesh.shape[a] > 1) if axis is not None else ()
        for mesh_axis in wanted:
            if mesh_axis in taken:
                raise ValueError(
                    f"{name or 'array'}: logical axes {taken[mesh_axis]!r} and {axis!r} both want "
                    f"mesh axis {mesh_axis!r}"
                )
            taken[mesh_axis] = str(axis)
        used: tuple[str, ...] = ()
        for mesh_axis in wanted:
            if size % math.prod(mesh.shape[a] for a in (*used, mesh_axis)) == 0:
                used = (*used, mesh_axis)
            else:
                break
        if used != wanted and fallbacks is not None:
            fallbacks.append(Fallback(name, dimension, size, wanted, used))
        entries.append(used if len(used) > 1 else used[0] if used else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def spec_axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension is sharded."""
    entry = spec[dimension] if dimension < len(spec) else None
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def path_name(path: Sequence[Any]) -> str:
    """A tree path as `a/b/c`: the name of a parameter in tables, messages and files."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_shardings(boxed: Any, mesh: Mesh, fallbacks: list | None = None) -> Any:
    """The shardings of a tree of Linen's boxed parameters, abstract as `jax.eval_shape(model.init, ...)` gives them."""
    axes = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, spec: NamedSharding(
            mesh,
            partition_spec(
                tuple(spec) + (None,) * (len(leaf.shape) - len(spec)),
                leaf.shape, mesh, name=path_name(path), fallbacks=fallbacks,
            ),
        ),
        nn.unbox(boxed),
        axes,
    )  # fmt: skip


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which a batch is sharded."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def mesh_in_force() -> Any:
    """The abstract mesh that `jax.set_mesh` set; None if it set none or a mesh of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """The platform that the traced program will run on: "cpu", "gpu" or "tpu".

    It is that of the mesh in force, because a program may be compiled for devices that are not here; without a mesh, it
    is that of JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else str(name)


def batch_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(i, n): this process loads part i of the n equal parts of each batch.

    Processes that share the rows of a tensor-parallel group load the same part.

    Raises:
        UserError: the rows of this process's devices are not contiguous.
    """
    rows = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in rows if index is not None})
    start, stop = spans[0][0], spans[-1][1]
    size = stop - start
    if sum(b - a for a, b in spans) != size or batch_size % size or start % size:
        raise UserError(
            f"mesh {_show(user_mesh(mesh))}: a process's {len(mesh.local_devices)} devices must hold neighbouring rows "
            "of the batch: make tensor a divisor or a multiple of the devices per process"
        )
    return start // size, batch_size // size


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with the sharding of its logical axes on the mesh in force (`jax.set_mesh`); `x` itself without a mesh."""
    mesh = mesh_in_force()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def gathered(x: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter gathered over fsdp, to compute with: over the second of fsdp's mesh axes, then over the first.

    The gradient then takes the way back as two reduce-scatters, each over a part of the devices, and the TPU compiler
    keeps them. Gathered in one step, the gradient would become an all-reduce and a slice, which send twice the bytes.
    """
    for name in ("embed_half", "width"):
        x = constrain(x, *(name if axis == "embed" else axis for axis in axes))
    return x
