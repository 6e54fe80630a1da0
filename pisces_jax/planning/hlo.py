"""The collectives of a compiled program: kind, mesh axes, bytes on the wire, and how often a step runs them.

They are read from the text of the optimized program. Bytes are those that one device sends in a ring of n devices: for
an all-gather its result × (n−1)/n, for a reduce-scatter and an all-to-all their operand × (n−1)/n, for an all-reduce
twice that, for a permute its operand. The TPU compiler writes some reduce-scatters as a fusion of an all-reduce and a
slice; these count as reduce-scatters. Between slices it hands operands to the hosts (`send`, marked with what the hosts
do with them); these count as the same collectives over mesh axis `data`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
# What hosts do with operands that they are sent, as the TPU compiler marks it.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([^\s=]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a program.

    Attributes:
        axis: the mesh axes along which the devices of a group lie, joined by "+".
        bytes: what a device sends in each execution.
        executions: per step.
        group: devices that take part.
        scope: the model's own name for the place.
    """

    kind: str
    axis: str
    bytes: float
    executions: int
    group: int
    scope: str


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool


@dataclasses.dataclass
class _Program:
    computations: dict[str, dict[str, _Instruction]]
    entry: str

    def root(self, computation: str) -> _Instruction:
        return next(i for i in self.computations[computation].values() if i.root)


@dataclasses.dataclass
class _Frame:
    """A computation; of a fused one also where it is called, with which operands."""

    computation: str
    caller: "_Frame | None" = None
    operands: Sequence[str] = ()


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of an optimized program for a mesh whose devices are numbered in the order of its axes.

    Raises:
        ValueError: a loop with collectives whose number of trips cannot be read, replica groups of an unknown form, or
            an unknown kind of transfer between slices.
    """
    program = _parse(text)
    found: Counter[tuple[str, str, float, int, str]] = Counter()
    seen: set[tuple[str, str]] = set()

    def visit(name: str, times: int) -> None:
        for i in program.computations[name].values():
            if i.opcode == "while":
                if _communicates(program, body := _attribute(i, "body")):
                    visit(body, times * _trips(program, name, i))
            elif kind := _kind(i):
                count(name, i, kind, times)
            else:
                for called in _called(i):
                    visit(called, times)

    def count(name: str, i: _Instruction, kind: str, times: int) -> None:
        if "async_collective" in name or "async_collective" in i.attributes:
            # An overlapped collective appears in several fusions with the same channel.
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            key = (kind, channel.group(1) if channel else i.name)
            if kind != "collective-permute" and key in seen:
                return
            seen.add(key)
        operand = sum(_size(program.computations[name][o].shape) for o in i.operands if o in program.computations[name])
        result = _size(i.shape)
        if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            result -= operand  # its shape is (operand, result, ...)
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        if i.opcode == "send":
            axis, n = "data", _slices(i)
            result = n * operand  # if it is gathered
        else:
            group = _group(i.attributes, kind, mesh_shape)
            axis, n = _axis(group, mesh_shape), len(group)
        share = (n - 1) / n
        wire = {
            "all-gather": result * share, "all-reduce": 2 * operand * share, "collective-permute": operand,
        }.get(kind, operand * share)  # fmt: skip
        scope = re.search(r'op_name="([^"]*)"', i.attributes)
        found[kind, axis, wire, n, _scope(scope.group(1) if scope else "")] += times

    visit(program.entry, 1)
    return [
        Collective(kind, axis, wire, times, n, scope) for (kind, axis, wire, n, scope), times in found.items() if wire
    ]


def _kind(i: _Instruction) -> str | None:
    if i.opcode == "send" and (match := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)):
        if match.group(1) not in _BETWEEN_SLICES:
            raise ValueError(f"a transfer between slices of an unknown kind: {match.group(1)}")
        return _BETWEEN_SLICES[match.group(1)]
    return next((k for k in KINDS if i.opcode in (k, f"{k}-start")), None)


def _slices(i: _Instruction) -> int:
    """How many slices take part: in `{1,2}x{0:3}` two, in which devices of the same place talk to each other.

    A permute has no such list, and two ends.
    """
    match = re.search(r'_xla_megascale_target="\{([\d,]+)\}', i.attributes)
    return len(match.group(1).split(",")) if match else 2


def _called(i: _Instruction) -> list[str]:
    """The computations that an instruction runs: of a loop its body, of a conditional all branches."""
    if i.opcode == "while":
        return [_attribute(i, "body")]
    if i.opcode == "conditional":
        return re.findall(r"%?([\w.\-]+)", _braces(i.attributes, "branch_computations="))
    return re.findall(r"(?:calls|to_apply|called_computation)=%?([^\s,})]+)", i.attributes)


def _communicates(program: _Program, computation: str) -> bool:
    """Whether a collective is in it, at any depth. Loops without any need not be counted."""
    instructions = program.computations[computation].values()
    return any(_kind(i) or any(_communicates(program, called) for called in _called(i)) for i in instructions)


def wire_bytes(found: Sequence[Collective]) -> float:
    """Bytes that a device sends per step."""
    return sum(c.bytes * c.executions for c in found)


def _parse(text: str) -> _Program:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            head = re.match(r"(ENTRY )?%?([^\s(]+)", line)
            if head is None or head.group(2) == "HloModule":
                continue
            current = computations.setdefault(head.group(2), {})
            if head.group(1):
                entry = head.group(2)
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, rest = match.groups()
            shape, rest = _shape_and_rest(rest)
            call = re.match(r"\s*([\w\-]+)\(", rest)
            if call is None:
                continue
            inside, attributes = _parenthesis(rest[call.end() :])
            # A constant's value and a parameter's number stand where operands stand.
            plain = call.group(1) in ("constant", "parameter")
            operands = [inside] if plain else re.findall(r"%([^\s,)]+)", inside)
            current[name] = _Instruction(name, shape, call.group(1), operands, attributes, bool(root))
    return _Program(computations, entry)


def _shape_and_rest(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = _parenthesis(text[1:])
    return f"({inside})", rest


def _parenthesis(text: str) -> tuple[str, str]:
    """The text before the closing parenthesis, and after it."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _braces(text: str, before: str) -> str:
    start = text.index(before) + len(before)
    return text[start : text.index("}", start)]


def _attribute(i: _Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([^\s,}})]+)", i.attributes)
    if match is None:
        raise ValueError(f"{i.opcode} {i.name} has no {name}")
    return match.group(1)


def _size(shape: str) -> float:
    """Bytes of a shape or of a tuple of them."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in _SHAPE.findall(shape)
    )


def _trips(program: _Program, computation: str, loop: _Instruction) -> int:
    """(limit − start) / step of a loop that counts upwards, as the compiler writes scans.

    The program for TPUs has no `known_trip_count`.
    """
    outside, condition, body = (
        _Frame(name) for name in (computation, _attribute(loop, "condition"), _attribute(loop, "body"))
    )
    _, carried = _trace(program, outside, loop.operands[0])
    inside, compare = _trace(program, condition, program.root(condition.computation).name)
    limit = start = step = None
    if compare.opcode == "compare" and "direction=LT" in compare.attributes:
        _, counter = _trace(program, inside, compare.operands[0])
        end = _trace(program, inside, compare.operands[1])
        limit = _constant(end[1])
        if limit is None and (place := _tuple_index(end[1])) is not None:
            limit = _constant(_trace(program, outside, carried.operands[place])[1])
        if (place := _tuple_index(counter)) is not None:
            start = _constant(_trace(program, outside, carried.operands[place])[1])
            where, add = _trace(program, body, program.root(body.computation).operands[place])
            terms = [_constant(_trace(program, where, o)[1]) for o in add.operands] if add.opcode == "add" else []
            step = next((value for value in terms if value is not None), None)
    if limit is None or start is None or not step:
        raise ValueError(f"loop {loop.name}: its number of trips cannot be read")
    return -(-(limit - start) // step)


def _trace(program: _Program, frame: _Frame, name: str) -> tuple[_Frame, _Instruction]:
    """The instruction that makes a value: behind copies, in a fusion, or outside it."""
    while True:
        i = program.computations[frame.computation][name]
        if i.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            name = i.operands[0]
        elif i.opcode == "fusion":
            frame = _Frame(_attribute(i, "calls"), frame, i.operands)
            name = program.root(frame.computation).name
        elif i.opcode == "parameter" and frame.caller is not None:
            frame, name = frame.caller, frame.operands[int(i.operands[0])]
        else:
            return frame, i


def _constant(i: _Instruction) -> int | None:
    return int(i.operands[0]) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.operands[0]) else None


def _tuple_index(i: _Instruction) -> int | None:
    return int(_attribute(i, "index")) if i.opcode == "get-tuple-element" else None


def _group(attributes: str, kind: str, mesh_shape: Mapping[str, int]) -> list[int]:
    """The devices of the first group, by their numbers in the mesh."""
    total = math.prod(mesh_shape.values())
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes)
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(n) for n in match.group(1).split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        _, size, shape, order = match.groups()
        return _iota(shape, order)[: int(size)]
    named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}"
    if match := re.search(named, attributes):
        sizes, device_ids, axes = match.groups()
        return _mesh_group(sizes, _device_ids(device_ids), axes)
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"replica groups of an unknown form: {attributes}")
    return list(range(total))


def _device_ids(text: str | None) -> list[int] | None:
    """`0,2,1,3`, or a short form of it as for `_iota`."""
    if not text:
        return None
    if re.fullmatch(r"[\d,]+", text):
        return [int(n) for n in text.split(",")]
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"device ids of an unknown form: {text}")
    return _iota(*match.groups())


def _iota(shape: str, order: str | None) -> list[int]:
    """`[4,2]T(1,0)`: the numbers from 0 to 7 as 4 × 2, transposed."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")] if order else None).reshape(-1).tolist()


def _mesh_group(sizes: str, device_ids: list[int] | None, axes: str) -> list[int]:
    """In a mesh `'a'=16,'b'=4`, the group along the named axes; `'a':(2)4`: the part of a of size 4 behind one of 2."""
    names = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    factors: list[tuple[int, bool]] = []
    wanted = {
        name: (int(before or 1), int(size or names[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in names.items():
        before, part = wanted.get(name, (size, 1))
        factors += [(before, False), (part, name in wanted), (size // before // part, False)]
    total = math.prod(names.values())
    ids = np.array(device_ids) if device_ids else np.arange(total)
    ids = ids.reshape([size for size, _ in factors])
    return ids[tuple(slice(None) if mine else 0 for _, mine in factors)].reshape(-1).tolist()


def _axis(group: Sequence[int], mesh_shape: Mapping[str, int]) -> str:
    places = np.array(np.unravel_index(np.array(group), tuple(mesh_shape.values())))
    return "+".join(n for n, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1) or "none"


def _scope(op_name: str) -> str:
    """The part of an operation's name that the model gave it, without JAX's own words."""
    words = [w for w in op_name.split("/") if w not in ("while", "body", "closed_call", "shard_map", "checkpoint")]
    words = [w for w in words if not re.match(r"(jit|jvp|transpose|vmap|remat|rematted|cond|branch)", w)]
    return "/".join(words[:4])  # such as language_model/layers/mlp/up
