"""How ATen ops are read into canonical values, one handler an op or a family of spellings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .canon import number_of
from .shapes import known_equal, normal_dim, to_dim
from .value import Dim, Shape, Value

_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")


def _name(node: Node) -> str:
    """The op's name without namespace and overload."""
    assert isinstance(node.target, OpOverload)
    name: str = node.target._opname
    return name


def _operands(b: ViewBuilder, node: Node, args: list[Any]) -> tuple[Value, Value, Shape]:
    shape, dtype = meta_of(node)
    return b.cast_operand(args[0], dtype, shape), b.cast_operand(args[1], dtype, shape), shape


@handles("add", "sub")
def _add_sub(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y, shape = _operands(b, node, args)
    alpha = args[2] if len(args) > 2 else 1
    if alpha != 1:
        y = b.canon.binary("mul", y, b.operand(alpha), y.shape)
    return b.canon.binary(_name(node), x, y, shape)


@handles("rsub")
def _rsub(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y, shape = _operands(b, node, args)
    if args[2] != 1:
        return None
    return b.canon.binary("sub", y, x, shape)


@handles("mul", "multiply")
def _mul(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y, shape = _operands(b, node, args)
    return b.canon.binary("mul", x, y, shape)


@handles("div.Tensor", "div.Scalar", "true_divide", "divide.Tensor")
def _div(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y, shape = _operands(b, node, args)
    return b.canon.binary("div", x, y, shape)


@handles("pow.Tensor_Scalar", "pow.Tensor_Tensor", "square")
def _pow(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    exponent = b.operand(args[1]) if len(args) > 1 else b.canon.const(2)
    return b.canon.power(b.cast_operand(args[0], dtype, shape), exponent, shape)


@handles("maximum", "minimum", "bitwise_and.Tensor", "bitwise_or.Tensor", "logical_and", "logical_or")
def _commutative(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y, shape = _operands(b, node, args)
    op = {"bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or"}.get(name := _name(node), name)
    if op in ("and", "or") and meta_of(node)[1] is not torch.bool:
        return None
    x = b.canon.bare(x, y, shape)
    x, y = sorted((x, b.canon.bare(y, x, shape)), key=lambda v: v.index)
    return b.table.intern(op, (x, y), {}, shape, meta_of(node)[1])


@handles(*(f"{op}.{overload}" for op in _COMPARE for overload in ("Tensor", "Scalar")))
def _compare(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, _ = meta_of(node)
    x, y = b.operand(args[0]), b.operand(args[1])
    x = b.canon.bare(x, y, shape)
    y = b.canon.bare(y, x, shape)
    op = _name(node)
    if op in ("gt", "ge"):
        op, x, y = {"gt": "lt", "ge": "le"}[op], y, x
    return b.table.intern(op, (x, y), {}, shape, torch.bool)


@handles("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    return b.canon.where(b.operand(args[0]), _branch(b, args[1], node), _branch(b, args[2], node), shape, dtype)


@handles("masked_fill")
def _masked_fill(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    return b.canon.where(b.operand(args[1]), _branch(b, args[2], node), b.operand(args[0]), shape, dtype)


def _branch(b: ViewBuilder, argument: Any, node: Node) -> Value:
    """One of the two operands that an op chooses from; a number as a constant, however it is held."""
    shape, dtype = meta_of(node)
    value = b.cast_operand(argument, dtype, shape)
    number = number_of(value)
    return value if number is None or dtype is None else b.canon.const(_typed(number, dtype))


def _typed(number: Any, dtype: torch.dtype) -> float | int | bool:
    """A number as a tensor of that type holds it."""
    if dtype.is_complex:
        return number  # type: ignore[no-any-return]
    return bool(number) if dtype is torch.bool else float(number) if dtype.is_floating_point else int(number)


@handles("clamp", "clamp_min", "clamp_max", "clip")
def _clamp(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    name = _name(node)
    low = args[1] if name != "clamp_max" else None
    high = args[2] if name in ("clamp", "clip") else args[1] if name == "clamp_max" else None
    shape, dtype = meta_of(node)
    operands = [b.cast_operand(args[0], dtype)]
    if high is None and low == 0 and not isinstance(low, Node):
        return b.canon.unary("relu", operands[0])
    operands += [b.operand(bound) for bound in (low, high) if bound is not None]
    return b.table.intern("clamp", operands, {"low": low is not None, "high": high is not None}, shape, dtype)


@handles("neg", "negative", "sqrt", "rsqrt", "reciprocal", "exp", "log", "tanh", "sigmoid", "silu", "relu", "cos", "sin", "abs", "erf")
def _unary(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    _, dtype = meta_of(node)
    name = {"negative": "neg"}.get(op := _name(node), op)
    return b.canon.unary(name, b.cast_operand(args[0], dtype))


@handles("gelu")
def _gelu(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.unary("gelu", b.operand(args[0]), approximate=args[1])


@handles("logical_not", "bitwise_not")
def _not(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x = b.operand(args[0])
    if x.dtype is not torch.bool:
        return None
    return x.args[0] if x.op == "not" else b.canon.unary("not", x)


# -------------------------------------------------------------------- casts and copies


@handles("_to_copy", "to", "type_as")
def _to_copy(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    source, val = args[0].meta["val"], node.meta["val"]
    if source.device != val.device or source.layout != val.layout:
        return None
    return b.canon.cast(b.operand(args[0]), val.dtype)


@handles("prims::convert_element_type")
def _convert(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.cast(b.operand(args[0]), args[1])


@handles("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh")
def _identity(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.operand(args[0])


@handles("copy")
def _copy(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """What `copy_` leaves in a tensor, whatever it held before."""
    source, val = args[1].meta["val"], node.meta["val"]
    if source.device != val.device or source.layout != val.layout:
        return None
    return b.canon.expand(b.canon.cast(b.operand(args[1]), val.dtype), meta_of(node)[0])


@handles("dropout", "feature_dropout")
def _dropout(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.operand(args[0]) if not args[2] or args[1] == 0 else None


@handles("scalar_tensor", "full", "full_like", "new_full")
def _full(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return _filled(b, node, args[0] if _name(node) == "scalar_tensor" else args[2 if _name(node) == "new_full" else 1])


@handles("arange")
def _arange(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """arange(start, step, length); of one element: that element."""
    shape, dtype = meta_of(node)
    if dtype is None or dtype.is_floating_point or dtype is torch.bool:
        return None
    given = dict(zip((spec.name for spec in node.target._schema.arguments), args, strict=True))  # type: ignore[union-attr]
    start, step = given.get("start", 0), given.get("step", 1)
    if known_equal(shape[0], 1) and not isinstance(start, Node):
        return _filled(b, node, start)
    attrs = {"length": shape[0], "device": node.meta["val"].device}
    return b.table.intern("arange", (b.operand(start), b.operand(step)), attrs, shape, dtype)


@handles("ones", "new_ones", "ones_like", "zeros", "new_zeros", "zeros_like")
def _ones_or_zeros(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return _filled(b, node, 1 if "ones" in _name(node) else 0)


def _filled(b: ViewBuilder, node: Node, number: Any) -> Value | None:
    """A tensor full of one number, which is written in the tensor's type."""
    shape, dtype = meta_of(node)
    if isinstance(number, Node) or dtype is None or dtype.is_complex:
        return None
    attrs = {"value": _typed(number, dtype), "shape": shape, "device": node.meta["val"].device}
    return b.table.intern("full", (), attrs, shape, dtype)


# -------------------------------------------------------------------- reductions and products


@handles("mean", "sum", "amax", "amin", "logsumexp")
def _reduce(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    dims = args[1] if len(args) > 2 else None
    keepdim = bool(args[2]) if len(args) > 2 else False
    dims = [dims] if isinstance(dims, int) else dims
    _, dtype = meta_of(node)
    return b.canon.reduce(_name(node), b.cast_operand(args[0], dtype), dims, keepdim)


@handles("max.dim", "min.dim")
def _max_dim(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x = b.operand(args[0])
    name = _name(node)
    values = b.canon.reduce(f"a{name}", x, [args[1]], bool(args[2]))
    dim = normal_dim(args[1], x.ndim)
    indices = b.table.intern(f"arg{name}", (x,), {"dim": dim, "keepdim": bool(args[2])}, values.shape, torch.int64)
    return b.table.unique("split", (x,), {"parts": (values, indices)}, (), None)


@handles("glu")
def _glu(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """F.glu: the first half times the sigmoid of the second."""
    x = b.operand(args[0])
    dim = normal_dim(args[1], x.ndim)
    half = meta_of(node)[0][dim]
    value, gate = b.canon.slice(x, dim, 0, half), b.canon.slice(x, dim, half, None)
    return b.canon.binary("mul", value, b.canon.unary("sigmoid", gate), meta_of(node)[0])


@handles("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype")
def _norm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """The Euclidean norm is the root of the sum of squares."""
    order, dims, keepdim = args[1], args[2], bool(args[3])
    if order not in (None, 2):
        return None
    _, dtype = meta_of(node)
    squares = b.canon.unary("square", b.cast_operand(args[0], dtype))
    dims = [dims] if isinstance(dims, int) else dims
    total = b.canon.reduce("sum", squares, dims, keepdim=True)
    root = b.canon.unary("sqrt", total)
    return root if keepdim else b.canon.reshape(root, meta_of(node)[0])


@handles("_softmax", "softmax", "_safe_softmax")
def _softmax(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    _, dtype = meta_of(node)
    x = b.cast_operand(args[0], dtype)
    if _name(node) == "_safe_softmax":  # zeros, not NaN, where everything is -inf: another value
        return b.table.intern("softmax", (x,), {"dim": normal_dim(args[1], x.ndim), "safe": True}, x.shape, x.dtype)
    return b.canon.softmax(x, args[1])


@handles("_log_softmax", "log_softmax")
def _log_softmax(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    return b.table.intern("log_softmax", (b.cast_operand(args[0], dtype),), {"dim": normal_dim(args[1], len(shape))}, shape, dtype)


@handles(
    "npu_fusion_lifted::scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
def _sdpa(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """sdpa(query, key, value, scale), with the mask as a fifth operand where there is one."""
    names = [spec.name for spec in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=True))
    query, key, value = (b.operand(given[name]) for name in ("query", "key", "value"))
    mask = given.get("attn_mask", given.get("attn_bias"))
    scale = given["scale"]
    lifted = len(node.target._schema.returns) == 1  # type: ignore[union-attr]
    if given["dropout_p"] != 0 or not (lifted or only_first_result(node)):
        return None
    factor = _inverse_root(b, query.shape[-1]) if scale is None else b.operand(scale)
    operands = [query, key, value, factor, *([] if mask is None else [b.operand(mask)])]
    shape, dtype = (*query.shape[:-1], value.shape[-1]), query.dtype
    result = b.table.intern("sdpa", operands, {"is_causal": bool(given["is_causal"])}, shape, dtype)
    return result if lifted else b.table.unique("split", (result,), {"parts": (result,)}, (), None)


def _inverse_root(b: ViewBuilder, size: Dim) -> Value:
    if isinstance(size, int):
        return b.canon.const(size**-0.5)
    return b.table.intern("symfloat", (b.canon.sym(size),), {"power": -0.5}, (), None)


def only_first_result(node: Node) -> bool:
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


@handles("mm", "bmm")
def _mm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.matmul(b.operand(args[0]), b.operand(args[1])) if node.target._overloadname == "default" else None  # type: ignore[union-attr]


@handles("matmul")
def _matmul(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, y = b.operand(args[0]), b.operand(args[1])
    return b.canon.matmul(x, y) if x.ndim >= 2 and y.ndim >= 2 else None


@handles("linear")
def _linear(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, weight = b.operand(args[0]), b.operand(args[1])
    if x.ndim < 2 or weight.ndim != 2:
        return None
    product = b.canon.matmul(x, b.canon.permute(weight, (1, 0)))
    return product if args[2] is None else b.canon.binary("add", product, b.operand(args[2]), product.shape)


@handles("addmm")
def _addmm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    if args[3] != 1 or args[4] != 1:
        return None
    folded = b.canon.matmul(b.operand(args[1]), b.operand(args[2]))
    bias = b.operand(args[0])
    if folded.op == "reshape" and bias.ndim == 1:  # keep the fold outside, as for mm
        inner = folded.args[0]
        return b.canon.reshape(b.canon.binary("add", inner, bias, inner.shape), folded.shape)
    return b.canon.binary("add", folded, bias, folded.shape)


@handles("baddbmm")
def _baddbmm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    product = b.canon.matmul(b.operand(args[1]), b.operand(args[2]))
    beta, alpha = args[3], args[4]
    if alpha != 1:
        product = b.canon.binary("mul", product, b.operand(alpha), product.shape)
    if beta == 0:
        return product
    bias = b.operand(args[0])
    if beta != 1:
        bias = b.canon.binary("mul", bias, b.operand(beta), bias.shape)
    return b.canon.binary("add", product, bias, product.shape)


# -------------------------------------------------------------------- views


@handles("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_alias", "view_as", "_reshape_copy")
def _reshape(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    x = b.operand(args[0])
    return b.canon.reshape(x, shape) if x.dtype == dtype else None


@handles("expand", "broadcast_to", "expand_as", "expand_copy")
def _expand(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.expand(b.operand(args[0]), meta_of(node)[0])


@handles("repeat")
def _repeat(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """Each repeated dimension s becomes (r, s): a new one, expanded and folded into it. Tiles of the last dimension stay as they are."""
    x = b.operand(args[0])
    times = [b.dim(count) for count in args[1]]
    sizes = (1,) * (len(times) - x.ndim) + x.shape
    if times and not known_equal(times[-1], 1) and not known_equal(sizes[-1], 1):
        return None
    apart: list[Any] = []
    expanded: list[Any] = []
    for count, size in zip(times, sizes, strict=True):
        tiled = not known_equal(count, 1) and not known_equal(size, 1)
        apart += [1, size] if tiled else [size]
        expanded += [count, size] if tiled else [count * size]
    return b.canon.reshape(b.canon.expand(b.canon.reshape(x, tuple(apart)), tuple(expanded)), meta_of(node)[0])


@handles("permute", "permute_copy")
def _permute(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.permute(b.operand(args[0]), args[1])


@handles("transpose", "swapaxes", "t", "mT", "transpose_copy", "t_copy")
def _transpose(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x = b.operand(args[0])
    if x.ndim < 2:
        return x
    i, j = (normal_dim(args[1], x.ndim), normal_dim(args[2], x.ndim)) if len(args) > 2 else (x.ndim - 2, x.ndim - 1)
    dims = list(range(x.ndim))
    dims[i], dims[j] = dims[j], dims[i]
    return b.canon.permute(x, dims)


@handles("slice", "slice_copy")
def _slice(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    if isinstance(args[4], Node) or args[4] < 1:
        return None
    x = b.operand(args[0])
    start, stop = (None if bound is None else b.dim(bound) for bound in args[2:4])
    length = None
    if args[4] != 1 and isinstance(start or 0, int) and (stop is None or stop == 2**63 - 1):
        length = meta_of(node)[0][normal_dim(args[1], x.ndim)]
    value = b.canon.slice(x, args[1], start, stop, args[4], length)
    return value if _agrees(value, node) else None


@handles("narrow")
def _narrow(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    start, length = b.dim(args[2]), b.dim(args[3])
    value = b.canon.slice(b.operand(args[0]), args[1], start, start + length)
    return value if _agrees(value, node) else None


@handles("select", "select_copy")
def _select(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x, dim, index = b.operand(args[0]), args[1], b.dim(args[2])
    stop = None if isinstance(index, int) and index == -1 else index + 1
    taken = b.canon.slice(x, dim, index, stop)
    return b.canon.reshape(taken, meta_of(node)[0])


def _agrees(value: Value, node: Node) -> bool:
    """Whether the canonical sizes are those that PyTorch computed: symbolic slice bounds that clamp are not understood."""
    shape, _ = meta_of(node)
    return len(shape) == value.ndim and all(known_equal(a, b) for a, b in zip(shape, value.shape, strict=True))


@handles("split", "split_with_sizes", "unbind", "chunk", "split_copy", "split_with_sizes_copy", "unbind_copy")
def _split(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x = b.operand(args[0])
    name = _name(node)
    unbinding = name.startswith("unbind")
    dim = normal_dim(args[1] if unbinding else args[2], x.ndim)
    parts, start = [], 0
    for val in node.meta["val"]:
        length = 1 if unbinding else to_dim(val.shape[dim])
        part = b.canon.slice(x, dim, start, start + length)
        parts.append(b.canon.reshape(part, x.shape[:dim] + x.shape[dim + 1 :]) if unbinding else part)
        start = start + length
    return b.table.unique("split", (x,), {"parts": tuple(parts)}, (), None)


@handles("cat", "concat", "concatenate")
def _cat(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    parts = [b.cast_operand(part, dtype) for part in args[0]]
    parts = [part for part in parts if not (part.ndim == 1 and known_equal(part.shape[0], 0))] or parts[:1]
    if any(part.ndim != len(shape) for part in parts):
        return None
    return b.canon.cat(parts, args[1])


@handles("stack")
def _stack(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    _, dtype = meta_of(node)
    return b.canon.stack([b.cast_operand(part, dtype) for part in args[0]], args[1])


@handles("view_as_complex")
def _view_as_complex(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.view_as_complex(b.operand(args[0]), node.meta["val"].dtype)


@handles("complex")
def _complex(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    shape, dtype = meta_of(node)
    parts = [b.canon.expand(b.operand(part), shape) for part in args]
    return b.canon.view_as_complex(b.canon.stack(parts, -1), dtype) if dtype is not None else None


@handles("view_as_real")
def _view_as_real(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.view_as_real(b.operand(args[0]))


@handles("_conj", "_conj_physical", "conj_physical")
def _conj(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    z = b.operand(args[0])
    return z.args[0] if z.op == "conj" else b.table.intern("conj", (z,), {}, z.shape, z.dtype)


@handles("resolve_conj", "resolve_neg")
def _resolve(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.operand(args[0])
