"""Finds the parts of MLA before the attention, from the product with W_UK; see mla_preprocess.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from npu_fusion.match import Match
from npu_fusion.rule import Reject
from npu_fusion.view import Form, Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, product, same_shape
from npu_fusion.view.value import Dim, Shape

from .matmul import weight_of_heads
from .mla_heads import Axes, axes_in, source_of_heads, views_of

_MOST_USERS = 200
"""How many values are looked at on the way to a form, casts and sums inside it included."""
_SUMS = ("combined", "compute_dtype", "round_dtype")

# -------------------------------------------------------------------- projections


@dataclass(frozen=True)
class Projection:
    """Some columns of a product with a matrix: `x @ weight`, of int8 numbers with the scales of rows and columns.

    Attributes:
        x: [..., K].
        weight: [K, columns].
        rows, columns: scales of int8 sums, for each row of x and each column of the weight; None of floating-point numbers.
        form: of `quant_linear`.
    """

    x: Value
    weight: Value
    rows: Value | None = None
    columns: Value | None = None
    form: Form | None = None

    @property
    def sums(self) -> dict[str, Any]:
        """How the sums become floating-point numbers: arguments of `mla_preprocess`."""
        if self.form is None:
            return {}
        args = self.form.args
        named = {f"sum_{name}": args[name] for name in _SUMS if args.get(name)}
        return {**named, "sum_rows_first": args.get("scale") is self.rows}


@dataclass(frozen=True)
class _Columns:
    """The columns `start` to `stop` of a value's last dimension."""

    whole: Value
    start: Dim
    stop: Dim


def _views(canon: Canon, value: Value) -> Iterator[_Columns]:
    """The value, and what it is some channels of, row for row, one after the other. Casts stand outside of views."""
    dtype = value.dtype if value.op == "cast" else None
    value, start, stop = value.args[0] if dtype is not None else value, 0, value.shape[-1]
    while True:
        yield _Columns(value if dtype is None else canon.cast(value, dtype), start, stop)
        if value.op == "slice" and value.attrs["dim"] == value.ndim - 1 and value.attrs["step"] == 1:
            start, stop = start + value.attrs["start"], stop + value.attrs["start"]
        elif value.op != "reshape" or not known_equal(value.shape[-1], value.args[0].shape[-1]):
            return
        value = value.args[0]


def _projection(canon: Canon, value: Value) -> Projection | Reject:
    """The product that a value is columns of."""
    for view in _views(canon, value):
        whole = view.whole
        if whole.form("weight_only_linear") is not None:
            return Reject("only the weights of a projection are quantised", whole)
        form = whole.form("quant_linear")
        if form is not None and form.args.get("scale") is not None:
            return _int8_projection(canon, view, form)
        if whole.op == "matmul" and whole.args[1].ndim == 2 and whole.dtype is not None and whole.dtype.is_floating_point:
            x, weight = whole.args
            return Projection(x, canon.slice(weight, 1, view.start, view.stop))
    return Reject("what should be a projection is none, or one with a bias", value)


def _int8_projection(canon: Canon, view: _Columns, form: Form) -> Projection | Reject:
    args = form.args
    if args.get("bias") is not None or args.get("zero_point") is not None:
        return Reject("a projection has a bias, or a zero point of its activations", view.whole)
    weight, scales = args["weight"], [args["scale"], args.get("scale2")]
    columns = [scale for scale in scales if scale is not None and _one_a_column(scale, weight.shape[1])]
    rows = [scale for scale in scales if scale is not None and scale not in columns]
    if len(columns) != 1 or len(rows) != 1:
        return Reject("the scales of an int8 projection are not one of rows and one of columns", view.whole)
    flat = canon.slice(canon.reshape(columns[0], (weight.shape[1],)), 0, view.start, view.stop)
    return Projection(args["x"], canon.slice(weight, 1, view.start, view.stop), rows[0], flat, form)


def _one_a_column(scale: Value, columns: Dim) -> bool:
    return scale.ndim > 0 and known_equal(scale.shape[-1], columns) and all(known_equal(size, 1) for size in scale.shape[:-1])


def _same(canon: Canon, a: Value | None, b: Value | None) -> bool:
    """Whether two values are the same numbers in the same order."""
    if a is None or b is None:
        return a is b
    return a is b or canon.reshape(a, b.shape) is b


def _known_as(canon: Canon, value: Value, op: str) -> tuple[Value, Form | None]:
    """The value in the shape in which it is known as a result of the op, and the form."""
    for view in _views(canon, value):
        if known_equal(view.whole.shape[-1], value.shape[-1]) and (form := view.whole.form(op)) is not None:
            return view.whole, form
    return value, None


def _base(value: Value) -> Value:
    """What a value is another shape of."""
    while value.op == "reshape":
        value = value.args[0]
    return value


# -------------------------------------------------------------------- heads


@dataclass(frozen=True)
class _Heads:
    """The query heads.

    Attributes:
        flat: [..., N * (D + R)], in whatever leading dimensions.
        lead: the leading dimensions of the tokens.
        count: N.
        nope: D.
    """

    flat: Value
    lead: Shape
    count: Dim
    nope: Dim

    @property
    def width(self) -> Dim:
        width: Dim = self.flat.shape[-1] // self.count
        return width

    @property
    def axes(self) -> Axes:
        return Axes.of(self.lead, self.count, self.width)

    def shape(self, channels: Dim, heads_first: bool) -> Shape:
        """[..., N, channels], or [B, N, S, channels]."""
        return (self.lead[0], self.count, *self.lead[1:], channels) if heads_first else (*self.lead, self.count, channels)

    def takes_nope(self, operand: Value) -> bool:
        """Whether the operand of a batched product is the first channels of every head, [N, tokens, D] or [B, N, S, D]."""
        found = axes_in(operand, self.flat, self.axes)
        order = "heads second" if operand.ndim == 4 else "heads first"
        wanted = Axes.of(self.lead, self.count, self.width, order).cut(0, self.nope)
        return found is not None and (found.order, found.start, found.stop) == (wanted.order, 0, self.nope)

    def rotated(self, x: Value) -> bool | None:
        """Whether heads come before tokens in a tensor of the other channels of every head; None for any other tensor."""
        found = axes_in(x, self.flat, self.axes)
        if found is None or (found.start, found.stop) != (self.nope, self.width):
            return None
        channels = self.width - self.nope
        for heads_first in (False, True)[: len(self.lead)]:
            order = Axes.of(self.lead, self.count, self.width, "heads second" if heads_first else "").order
            if found.order == order and same_shape(x.shape, self.shape(channels, heads_first)):
                return heads_first
        return None


# -------------------------------------------------------------------- forms


def _forms_of_users(value: Value, op: str, reads: Callable[[Form], bool]) -> Iterator[Form]:
    """The forms of the op among the values that are computed from this one, those of which `reads` holds."""
    pending, seen = [value], {value}
    while pending and len(seen) < _MOST_USERS:
        for user in pending.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            form = user.form(op)
            if form is not None and reads(form):
                yield form
            pending.append(user)


# -------------------------------------------------------------------- all together


@dataclass(frozen=True)
class Preprocess:
    """The parts of MLA before the attention, and what leaves it; see the arguments and results of `ops.mla.mla_preprocess`."""

    site: Value
    lead: Shape
    q_a: Projection
    kv_a: Projection
    q_b: Projection
    k_b_weight: Value
    q_norm: Form
    kv_norm: Form
    normed: Value
    quantize: Form | None
    rotary: Form
    q_nope: Value
    q_rope: Value
    latent: Value
    k_rope: Value
    heads_first: bool
    rope_heads_first: bool
    forms: list[Form]

    @property
    def sums(self) -> dict[str, Any]:
        return self.q_b.sums


def trace_preprocess(m: Match) -> Preprocess | Reject:
    """All parts, from the product with W_UK; or why they are not those of MLA."""
    canon, site = m.view.canon, m["site"]
    if site.ndim not in (3, 4) or site.dtype is None or not site.dtype.is_floating_point:
        return Reject("the product is not one matrix for each head", site)
    k_b_weight = weight_of_heads(m)
    if k_b_weight is None:
        return Reject("the matrices differ from batch to batch", m["weight"])
    count, nope, size = k_b_weight.shape
    source = source_of_heads(canon, m["operand"], count)
    if source is None:
        return Reject("what is multiplied with a matrix for each head is no part of the channels of heads", m["operand"])
    flat, lead = source
    q_side = _query_side(canon, flat)
    if isinstance(q_side, Reject):
        return q_side
    q_b, normed, q_norm, quantize, q_a = q_side
    heads = _Heads(flat, lead, count, nope)
    if not heads.takes_nope(m["operand"]):
        return Reject("the product does not take the first channels of every head", m["operand"])
    beside = _keys_and_latent(canon, heads, size, q_a)
    if isinstance(beside, Reject):
        return beside
    rotated, kv_a, kv_norm, latent = beside
    alike = _same_sums(q_a, kv_a, q_b)
    if alike is not None:
        return alike
    q_nope, heads_first = _absorbed(m, heads, size)
    forms = [q_norm, kv_norm, *rotated.forms, *(form for form in (quantize, q_a.form, kv_a.form, q_b.form) if form is not None)]
    forms += [form for form in (q_nope.form("bmm_transpose"),) if form is not None]
    return Preprocess(
        site, heads.lead, q_a, kv_a, q_b, k_b_weight, q_norm, kv_norm, normed, quantize, rotated.forms[0],
        q_nope, rotated.q, latent, rotated.k, heads_first, rotated.heads_first, forms,
    )  # fmt: skip


_QuerySide = tuple[Projection, Value, Form, Form | None, Projection]


def _query_side(canon: Canon, flat: Value) -> _QuerySide | Reject:
    """The second projection of the queries, their norm with its form and that of its quantisation, and the first projection."""
    q_b = _projection(canon, flat)
    if isinstance(q_b, Reject):
        return q_b
    x, quantize = q_b.x, None
    if q_b.form is not None:
        _, quantize = _known_as(canon, x, "quantize")
        if quantize is None or quantize.output != 0:
            return Reject("the input of an int8 projection is not quantised in the graph", x)
        if quantize.args.get("scale") is not None or not _same(canon, q_b.rows, quantize.match.call.outputs[1]):
            return Reject("the queries are not quantised by a scale that is found for each row", x)
        x = quantize.args["x"]
    normed, q_norm = _known_as(canon, x, "rms_norm")
    if q_norm is None:
        return Reject("queries are projected in one step, or not normalised between the two", x)
    q_a = _projection(canon, q_norm.args["x"])
    return q_a if isinstance(q_a, Reject) else (q_b, normed, q_norm, quantize, q_a)


@dataclass(frozen=True)
class _Rotated:
    """The rotation of the heads' other channels and of one head of keys.

    Attributes:
        forms: of the rotations: one, or one of the queries and one of the keys.
        q, k: the results.
        keys: the keys before it.
        heads_first: whether heads come before the tokens.
    """

    forms: tuple[Form, ...]
    q: Value
    k: Value
    keys: Value
    heads_first: bool


def _rotations(canon: Canon, heads: _Heads) -> Iterator[_Rotated]:
    """The rotations of queries and keys by one table: several where layers share it, and the keys are rotated by themselves."""
    source = heads.flat.args[0] if heads.flat.op == "cast" else heads.flat
    for form in _forms_of_users(source, "rotary", lambda form: form.match.root.dtype == heads.flat.dtype):
        for at, x in enumerate(form.args["xs"]):
            heads_first = heads.rotated(x)
            if heads_first is None or form.args.get("rotary_dim", -1) != -1:
                continue
            one_head = replace(heads, count=1).shape(x.shape[-1], heads_first)
            alone = len(form.args["xs"]) == 1
            pairs = [(other, 0) for other in _rotations_alike(canon, form)] if alone else [(form, 1 - at)]
            for other, place in pairs:
                q, k, keys = form.match.call.outputs[at], other.match.call.outputs[place], other.args["xs"][place]
                if q is not None and k is not None and _same_or_reshaped(canon, keys, one_head):
                    yield _Rotated(tuple(dict.fromkeys((form, other))), q, canon.reshape(k, one_head), keys, heads_first)


def _same_or_reshaped(canon: Canon, keys: Value, one_head: Shape) -> bool:
    """Whether the keys have the shape of one head, whatever unit dimensions they have."""
    return known_equal(keys.shape[-1], one_head[-1]) and known_equal(product(keys.shape), product(one_head))


def _rotations_alike(canon: Canon, form: Form) -> Iterator[Form]:
    """The other rotations of one tensor by the same table, turned the same way."""

    def alike(other: Form) -> bool:
        same = all(form.args.get(name) == other.args.get(name) for name in ("layout", "sign", "rotary_dim", "out_dtype"))
        tables = all(_same(canon, other.args[name], form.args[name]) for name in ("cos", "sin"))
        return other is not form and same and tables and len(other.args["xs"]) == 1

    yield from _forms_of_users(_base(form.args["cos"]), "rotary", alike)


def _keys_and_latent(canon: Canon, heads: _Heads, size: Dim, q_a: Projection) -> tuple[_Rotated, Projection, Form, Value] | Reject:
    """The rotation of queries and keys, and what `_latent_side` finds of the latent that lies before those keys."""
    rejected = Reject("the other channels of the heads are not rotated together with one head of keys", heads.flat)
    for rotated in _rotations(canon, heads):
        found = _latent_side(canon, rotated.keys, size, q_a, heads.lead)
        if not isinstance(found, Reject):
            return rotated, *found
        rejected = found
    return rejected


def _latent_side(canon: Canon, k_pe: Value, size: Dim, q_a: Projection, lead: Shape) -> tuple[Projection, Form, Value] | Reject:
    """The projection of latent and keys, and the norm of the latent: the columns before the keys."""
    for view in _views(canon, k_pe):
        latent = canon.slice(view.whole, -1, view.start - size, view.start) if view.start != 0 else None
        norms = [] if latent is None else list(_forms_of_users(_base(latent), "rms_norm", partial(_normalises, canon, latent)))
        norm = max(norms, key=lambda form: len(form.match.visited), default=None)  # the whole of it, its weight included
        if norm is None:
            continue
        both = canon.slice(view.whole, -1, view.start - size, view.stop)
        kv_a = _projection(canon, both)
        if isinstance(kv_a, Reject):
            return kv_a
        if not _same(canon, kv_a.x, q_a.x) or not _same(canon, kv_a.rows, q_a.rows):
            return Reject("queries and latent are not projected from the same hidden states", kv_a.x)
        normed = norm.match.call.outputs[0]
        assert normed is not None
        return kv_a, norm, canon.reshape(normed, (*lead, size))
    return Reject("no norm reads the columns before the rotated keys", k_pe)


def _same_sums(q_a: Projection, kv_a: Projection, q_b: Projection) -> Reject | None:
    """The projections that are quantised scale their sums alike, and to one dtype; both of the hidden states are, or none."""
    if (q_a.form is None) != (kv_a.form is None) or (q_b.form is None and q_a.form is not None):
        return Reject("some projections are quantised, others not", q_a.x)
    quantised = [p for p in (q_a, kv_a, q_b) if p.form is not None]
    if any(p.sums != quantised[0].sums for p in quantised[1:]):
        return Reject("the int8 projections scale their sums in different ways", q_a.x)
    return None


def _absorbed(m: Match, heads: _Heads, size: Dim) -> tuple[Value, bool]:
    """The product with W_UK as [..., N, C], or [B, N, S, C] where the heads stay before the tokens; and whether they do."""
    canon, site = m.view.canon, m["site"]
    axes = Axes.of(heads.lead, heads.count, size, "heads second" if site.ndim == 4 else "heads first")
    wanted = {
        flag: Axes.of(heads.lead, heads.count, size, "heads second" if flag else "").order for flag in (False, True)[: len(heads.lead)]
    }
    views = [(value, known) for value, known in views_of(site, axes) if value.node is not None and value.op != "slice"]
    for flag, order in wanted.items():
        for value, known in views:
            if known.order == order:
                return canon.reshape(value, heads.shape(size, flag)), flag
    moved = canon.permute(canon.reshape(site, (heads.count, *heads.lead, size)), (*range(1, len(heads.lead) + 1), 0, len(heads.lead) + 1))
    return moved, False


def _normalises(canon: Canon, latent: Value, form: Form) -> bool:
    return _same(canon, form.args["x"], latent)
