"""The table of Ascend ops: what may be called on which SoC with which dtypes and sizes, and where each fact comes from.

The facts are in `table/*.toml`, one file a family, one TOML table an op::

    ["npu::npu_rms_norm"]
    schema = "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)"
    outputs = ["y", "rstd"]              # names of the results, in order
    uses = ["y"]                         # those that the project uses; for an op without results the arguments that it writes
    computes = "RMSNorm over the last dimensions, gamma multiplied in fp32, one cast"
    targets = ["ascend910b", ...]        # SoCs that have the op
    since = "2.1"                        # oldest torch_npu that has it; "" where the op is of another library
    meta = true                          # has a meta kernel of its own
    ge_converter = true                  # torchair can convert it
    capture = "safe"                     # or why a graph capture cannot hold it
    host_lists = []                      # int lists that a capture freezes, to be updated before a replay
    collective = true                    # ranks of a group call it together: a machine cannot test it by itself
    source = "op-plugin docs ...; ops-nn norm/rms_norm"

    [["npu::npu_rms_norm".limits]]       # one row a constraint; all rows whose `targets` hold (all, where not given) must be met
    targets = ["ascend910b"]             # optional
    dtypes = { input = ["float16", "bfloat16"], gamma = ["float16"] }    # of tensor arguments; see Limit for the other kinds
    source = "..."

A limit is a conjunction, except that rows with the same `any` name are alternatives, of which one must hold.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import NpuFusionError
from ...view import Value
from ...view.shapes import known_equal, known_ge, product, to_dim, to_shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOCS = ("ascend310p", "ascend910b", "ascend910_93", "ascend950")
FOLDER = Path(__file__).parent / "table"
SAFE = "safe"


@dataclass(frozen=True)
class Limit:
    """One constraint on a call.

    Attributes:
        dtypes: tensor argument to the names of the dtypes that it may have.
        same_dtype: tensor arguments that must have one dtype.
        rank: tensor argument to the least and greatest number of dimensions.
        sizes: `argument[dim]` to a condition on that size, `{min, max, multiple_of, one_of}`; `argument[:-1]` is the product of all but the
            last, `x[0]*x[1]` that of two.
        same_sizes: groups of `argument[dim]` that must be equal, or be numbers.
        values: argument to the Python values that it may have; the string `None` stands for None.
        absent: arguments that must be left out.
        present: arguments that must be given.
        nonempty: tensor arguments that must have elements.
        targets: the SoCs that it holds for; all where empty.
        any: rows of one op with the same name here are alternatives.
        source: where the fact comes from.
    """

    dtypes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    same_dtype: Sequence[str] = ()
    rank: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    same_sizes: Sequence[Sequence[str | int]] = ()
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    absent: Sequence[str] = ()
    present: Sequence[str] = ()
    nonempty: Sequence[str] = ()
    targets: Sequence[str] = ()
    any: str = ""
    source: str = ""


@dataclass(frozen=True)
class AscendOp:
    """One row of the table; the module's docstring says what the fields are."""

    name: str
    schema: str
    outputs: Sequence[str]
    uses: Sequence[str]
    computes: str
    targets: Sequence[str]
    since: str
    meta: bool
    ge_converter: bool
    capture: str
    source: str
    host_lists: Sequence[str] = ()
    limits: Sequence[Limit] = ()
    collective: bool = False

    @property
    def namespace(self) -> str:
        return self.name.split("::")[0]

    @property
    def opname(self) -> str:
        """Name without namespace and overload."""
        return self.name.split("::")[1].split(".")[0]

    @property
    def overload(self) -> str:
        return self.name.split("::")[1].partition(".")[2] or "default"

    @property
    def shown(self) -> str:
        """As reports name it: `npu.npu_rms_norm`."""
        return self.name.replace("::", ".")

    @property
    def capturable(self) -> bool:
        return self.capture == SAFE

    def refusal(self, arguments: Mapping[str, Any], target: str) -> str | None:
        """Why the op cannot take a call on a SoC, or None.

        Args:
            arguments: by the schema's names, defaults filled in; tensors as FX nodes, fake tensors or values of the view.
            target: the SoC.
        """
        if target not in self.targets:
            return f"not on {target}"
        alternatives: dict[tuple[str, bool], list[str]] = defaultdict(list)
        met: set[str] = set()
        for limit in self.limits:
            if limit.targets and target not in limit.targets:
                continue
            reason = violation(limit, arguments)
            if limit.any and reason is None:
                met.add(limit.any)
            elif limit.any:
                alternatives[limit.any, not in_mode(limit, arguments)].append(str(reason))
            elif reason is not None:
                return reason
        # Of alternatives for several modes of the op those for the mode of the call say what is wrong with it.
        for (name, _), reasons in sorted(alternatives.items()):
            if name not in met:
                return f"{name}: {' and '.join(dict.fromkeys(reasons))}"
        return None


@cache
def ascend_ops() -> Mapping[str, AscendOp]:
    """The whole table, by qualified name, in the order of its files.

    Raises:
        TableError: a file of the table is malformed.
    """
    ops: dict[str, AscendOp] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        for name, row in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if name in ops:
                raise TableError(f"{path.name}: {name} is in the table twice")
            ops[name] = _op(path.name, name, row)
    return ops


class TableError(NpuFusionError):
    """The table of Ascend ops is malformed."""


def _op(file: str, name: str, row: dict[str, Any]) -> AscendOp:
    try:
        limits = tuple(Limit(**limit) for limit in row.pop("limits", []))
        return AscendOp(name=name, limits=limits, **row)
    except TypeError as error:
        raise TableError(f"{file}: {name}: {error}") from None


def host_lists(target: Any) -> tuple[str, ...]:
    """The arguments of an FX call target that a capture freezes: int lists which the host reads. Empty for ops outside the table."""
    op = find_op(target)
    return tuple(op.host_lists) if op is not None else ()


def find_op(target: Any) -> AscendOp | None:
    """The table's row of an FX call target, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    qualified = name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    return ascend_ops().get(qualified)


# -------------------------------------------------------------------- checking


def violation(limit: Limit, arguments: Mapping[str, Any]) -> str | None:
    """What of a limit a call does not keep, or None. A size that is not known to fit does not fit."""
    return next(_violations(limit, arguments), None)


def in_mode(limit: Limit, arguments: Mapping[str, Any]) -> bool:
    """Whether a limit's `values` are those of a call: the limit is about calls like it."""
    return all(_shown(arguments[name]) in map(_shown, values) for name, values in limit.values.items())


def _violations(limit: Limit, arguments: Mapping[str, Any]) -> Iterator[str]:
    tensors = {name: tensor for name, value in arguments.items() if (tensor := _tensor(value)) is not None}
    yield from _type_violations(limit, tensors)
    yield from _shape_violations(limit, tensors)
    for name, values in limit.values.items():
        if _shown(arguments[name]) not in [_shown(value) for value in values]:
            yield f"{name}={arguments[name]!r}, not {' or '.join(map(repr, values))}"
    for name in limit.absent:
        if arguments.get(name) is not None:
            yield f"it takes no {name}"
    for name in limit.present:
        if arguments.get(name) is None:
            yield f"it needs {name}"


def _type_violations(limit: Limit, tensors: Mapping[str, _Known]) -> Iterator[str]:
    for name, dtypes in limit.dtypes.items():
        if name in tensors and _dtype(tensors[name]) not in dtypes:
            yield f"{name} is {_dtype(tensors[name])}, not {' or '.join(dtypes)}"
    named = {name: _dtype(tensors[name]) for name in limit.same_dtype if name in tensors}
    if len(set(named.values())) > 1:
        yield f"{', '.join(f'{name} is {dtype}' for name, dtype in named.items())}: they must have one dtype"


def _shape_violations(limit: Limit, tensors: Mapping[str, _Known]) -> Iterator[str]:
    for name, (least, most) in limit.rank.items():
        if name in tensors and not least <= tensors[name].dim() <= most:
            yield f"{name} has {tensors[name].dim()} dimensions, not {least} to {most}"
    for place in (*limit.sizes, *(place for group in limit.same_sizes for place in group)):
        if (short := _without_dimension(place, tensors)) is not None:
            yield f"{short} has {tensors[short].dim()} dimensions, there is no {place}"
            return
    for place, condition in limit.sizes.items():
        size = _size(place, tensors)
        if size is not None and (reason := _size_violation(size, condition)) is not None:
            yield f"{place} is {size}, {reason}"
    for group in limit.same_sizes:
        sizes = [size for place in group if (size := _size(place, tensors)) is not None]
        if any(not known_equal(sizes[0], size) for size in sizes[1:]):
            yield f"{', '.join(map(str, group))} are {', '.join(map(str, sizes))}: they must be equal"
    for name in limit.nonempty:
        if name in tensors and any(isinstance(size, int) and size == 0 for size in tensors[name].shape):
            yield f"{name} is empty"


def _size_violation(size: Any, condition: Mapping[str, Any]) -> str | None:
    if "one_of" in condition and not any(known_equal(size, one) for one in condition["one_of"]):
        return f"not {' or '.join(map(str, condition['one_of']))}"
    if "min" in condition and not known_ge(size, condition["min"]):
        return f"not known to be at least {condition['min']}"
    if "max" in condition and not known_ge(condition["max"], size):
        return f"not known to be at most {condition['max']}"
    if "multiple_of" in condition and not known_equal(size % condition["multiple_of"], 0):
        return f"not known to be a multiple of {condition['multiple_of']}"
    return None


@dataclass(frozen=True)
class _Known:
    """What limits ask of a tensor."""

    shape: Sequence[Any]
    dtype: torch.dtype

    def dim(self) -> int:
        return len(self.shape)


def _tensor(value: Any) -> _Known | None:
    if isinstance(value, Value):
        return _Known(value.shape, value.dtype) if value.dtype is not None else None
    value = value.meta.get("val") if isinstance(value, Node) else value
    return _Known(value.shape, value.dtype) if isinstance(value, Tensor) else None


def _dtype(tensor: _Known) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(place: str | int, tensors: Mapping[str, _Known]) -> Any:
    """The size that is meant by `argument[dim]`, `argument[:-1]` or a product, None where the argument is not given; a number is itself."""
    if isinstance(place, int):
        return place
    if "*" in place:
        factors = [_size(factor, tensors) for factor in place.split("*")]
        return None if None in factors else product(factors)
    name, _, dim = place.removesuffix("]").partition("[")
    if name not in tensors:
        return None
    shape = tensors[name].shape
    return product(to_shape(shape[:-1])) if dim == ":-1" else to_dim(shape[int(dim)])


def _without_dimension(place: str | int, tensors: Mapping[str, _Known]) -> str | None:
    """The tensor that has too few dimensions to have a size `argument[dim]`, or None."""
    for factor in str(place).split("*"):
        name, _, dim = factor.removesuffix("]").partition("[")
        rank = tensors[name].dim() if name in tensors else None
        if rank is not None and dim != ":-1" and not -rank <= int(dim) < rank:
            return name
    return None


def _shown(value: Any) -> str:
    return "'None'" if value is None else repr(value)
