"""Multi-head latent attention before the attention, on Ascend: `npu_mla_prolog_v3`, one launch for both projections, norms, rotation, the
product with W_UK, and the cache writes.

The op always writes a paged cache. As a provider of `mla_preprocess`, which knows no caches, it gets small ones of its own: as many pages
as there are tokens, from which latent and keys are read as they are. Where both are written into caches of the model after that, and read
by nobody else, the op is called with those in their place (`prolog_into_caches`).

Its weights lie with the inputs first, [inputs, outputs], in the format FRACTAL_NZ. The graph asks for that format, which is nothing to do
where they have it; the transposition of a linear's weight would be a copy at every call, so that one is refused:
`npu_fusion.store_inputs_first` stores it so, once, as the same parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...cache_writes import Absorbed, RowWrite
from ...config import FusionConfig
from ...layout import row_major
from ...lower import Arguments, Builder
from ...ops.mla import MlaShapes
from ...view import Literal, Value
from ...view.shapes import known_equal, product, same_shape, to_shape
from ...weight_storage import FRACTAL_NZ, is_in_nz
from ...whole import register_whole
from .cache import slots_of, writes
from .norm_rope_cache import calls_of, shapes_of
from .provide import Npu, provides
from .table import SOCS, ascend_ops

aten = torch.ops.aten
PROLOG, FUNCTIONAL = "npu::npu_mla_prolog_v3", "npu::npu_mla_prolog_v3_functional"
PAGES = (128, 16)
_HIDDEN, _HEADS = (6144, 7168, 7680), (1, 2, 4, 8, 16, 32, 64, 128)
_SIZES = {"q_lora": 1536, "nope": 128, "rope": 64, "latent": 512}
_WEIGHTS = ("q_a_weight", "kv_a_weight", "q_b_weight")
_LAYOUTS = ("mla", "interleaved")
_LEAST_AMAX = 1e-4
"""A lower bound of max|x| that a model sets and the op does not: of a norm's row nothing but zeros lie under it."""

# -------------------------------------------------------------------- what it takes


def _why_not(a: Mapping[str, Any], exact: bool) -> str | None:
    """Why the op does not take a call, by shapes, dtypes and plain arguments: of tensors (fake ones) or of values of the view."""
    sizes = MlaShapes.of(a["x"], a["k_b_weight"], a["q_b_weight"])
    found = {"q_lora": a["q_b_weight"].shape[0], "nope": sizes.nope, "rope": sizes.rope, "latent": sizes.latent}
    hidden = a["x"].shape[-1]
    wrong = [f"{name} {found[name]}, not {size}" for name, size in _SIZES.items() if not known_equal(found[name], size)]
    if not any(known_equal(hidden, size) for size in _HIDDEN):
        wrong.append(f"hidden size {hidden}, not {' or '.join(map(str, _HIDDEN))}")
    if not any(known_equal(sizes.heads, count) for count in _HEADS):
        wrong.append(f"{sizes.heads} heads, not a power of two up to {_HEADS[-1]}")
    if wrong:
        return f"{PROLOG.removeprefix('npu::')} has the sizes of DeepSeek-V3, the model has {', '.join(wrong)}"
    return _wrong_types(a) or _wrong_rotation(a) or _wrong_quantisation(a, exact)


def _wrong_types(a: Mapping[str, Any]) -> str | None:
    floats = {name: a[name] for name in ("k_b_weight", "q_norm_weight", "kv_norm_weight", "cos", "sin")}
    for name, tensor in floats.items():
        if tensor is None or tensor.dtype != torch.bfloat16:
            return f"it takes {name} in bfloat16, the model has {'none' if tensor is None else tensor.dtype}"
    for name in ("q_eps", "kv_eps"):
        if a[name] is None:
            return f"{name} is known at run time only"
    scales = {name: a.get(name) for name in ("x_scale", "q_a_scale", "kv_a_scale", "q_b_scale")}
    for name, scale in scales.items():
        if scale is not None and scale.dtype != torch.float32:
            return f"it takes {name} in float32, the model has {scale.dtype}"
    rows = scales["x_scale"]
    if rows is not None and not (known_equal(product(rows.shape), product(a["x"].shape[:-1])) and known_equal(rows.shape[-1], 1)):
        return "it takes a scale for each row of x"
    return None


def _wrong_rotation(a: Mapping[str, Any]) -> str | None:
    if a.get("layout", "half") not in _LAYOUTS:
        return "it rotates neighbouring channels, the model pairs halves"
    if a.get("sign", 1) != 1:
        return "it turns the other way"
    heads_dim = -3 if a.get("rope_heads_first") else -2
    for table in (a["cos"], a["sin"]):
        if len(table.shape) >= -heads_dim and not known_equal(table.shape[heads_dim], 1):
            return "its tables are shared by all heads"
    return None


def _wrong_quantisation(a: Mapping[str, Any], exact: bool) -> str | None:
    round_dtype = a.get("round_dtype")
    if exact and round_dtype not in (None, torch.float32):
        return f"it keeps the norms in fp32, the model rounds them to {round_dtype} before their weights: rounding is 'exact'"
    if a.get("q_b_scale") is None:
        wide = a.get("norm_dtype") not in (None, torch.bfloat16)
        return "it rounds the norm of the queries to bfloat16, the model does not" if wide else None
    if exact:
        return "it keeps sums and norm in fp32 before the queries are quantised, the model rounds them: rounding is 'exact'"
    defaults = {"symmetric": True, "per_tensor": False, "with_zero": False, "smooth_divide": False, "steps": 127.0, "high": 127.0}
    other = [name for name, value in defaults.items() if a.get(name, value) != value]
    other += [name for name in ("scale", "zero_point") if a.get(name) is not None]
    if other or a.get("low", -128.0) not in (-128.0, -127.0) or a.get("dtype") not in (None, torch.int8):
        return f"it quantises symmetrically by row, max|x| being 127, the model does not ({', '.join(other) or 'range or dtype'})"
    floor, mode = a.get("floor", 0.0), a.get("floor_mode", "none")
    scaled = mode in ("scale", "add_scale")
    if mode in ("amax", "add_amax", "scale", "add_scale") and floor * (127 if scaled else 1) > _LEAST_AMAX:
        return f"the model does not let the scale fall below {floor}"
    smooth = a.get("smooth")
    return "it takes smooth scales in float32" if smooth is not None and smooth.dtype != torch.float32 else None


@register_whole("mla_preprocess", [target for target in ascend_ops()[PROLOG].targets if target in SOCS])
def why_not_prolog(a: Mapping[str, Any], config: FusionConfig) -> str | None:
    """Why npu_mla_prolog_v3 does not take what a rule found, weights as they are stored included."""
    plain = {name: value.value if isinstance(value, Literal) else value for name, value in a.items()}
    reason = _why_not(plain, config.rounding == "exact")
    if reason is not None:
        return reason
    stored = [name for name in _WEIGHTS if not _is_stored(a[name])]
    return _STORED.format(", ".join(stored)) if stored else None


_STORED = (
    "it reads weights stored with their inputs first and in NZ, and {} would be copied at every call: see npu_fusion.store_inputs_first"
)


def _is_stored(weight: Value) -> bool:
    """Whether a matrix [inputs, outputs] of the graph lies in memory as the op reads it."""
    node = weight.node
    if node is not None:
        return row_major(node.meta["val"]) and is_in_nz(node)
    source = weight.args[0].node if weight.op == "permute" else None
    return source is not None and row_major(source.meta["val"].t()) and is_in_nz(source)


# -------------------------------------------------------------------- into pages of its own


@provides("mla_preprocess", PROLOG)
def mla_prolog(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """Queries, latent and keys of the tokens [T, H], through pages that hold these alone."""
    names = [spec.name for spec in b.node.target._schema.arguments]  # type: ignore[union-attr]
    given = {name: getattr(a, name) for name in names}
    known = {name: b.val(value) if isinstance(value, Node) else value for name, value in given.items()}
    reason = _why_not(known, b.config.rounding == "exact")
    b.require(reason is None, reason or "")
    stored = [name for name in _WEIGHTS if not (row_major(b.val(given[name])) and is_in_nz(given[name]))]
    b.require(not stored, _STORED.format(", ".join(stored)))
    b.require(all(isinstance(given[name], float) for name in ("q_eps", "kv_eps")), "its eps are constants, the model's are not")
    lead: list[Any] = [b.size(a.x, dim) for dim in range(b.val(a.x).dim() - 1)]
    x = b.contiguous(b.reshape(a.x, [-1, b.val(a.x).shape[-1]]))
    call = npu(FUNCTIONAL, x, *_operands(b, a, npu, lead), *_pages(b, x), cache_index=_range(b, x), **_options(b, a))
    query, query_rope, *_, latents, keys = call
    latent, k_rope = (_rows(b, cache, x) for cache in (latents, keys))
    if a.layout == "interleaved":
        query_rope, k_rope = _interleaved(b, query_rope), _interleaved(b, k_rope)
    heads = b.val(query).shape[1]
    q_nope = b.reshape(query, [*lead, heads, _SIZES["latent"]])
    q_rope = b.reshape(query_rope, [*lead, heads, _SIZES["rope"]])
    k_rope = b.reshape(k_rope, [*lead, 1, _SIZES["rope"]])
    if a.rope_heads_first:
        q_rope, k_rope = b.transpose(q_rope, 1, 2), b.transpose(k_rope, 1, 2)
    return [b.transpose(q_nope, 1, 2) if a.heads_first else q_nope, q_rope, b.reshape(latent, [*lead, _SIZES["latent"]]), k_rope]


def _operands(b: Builder, a: Arguments, npu: Npu, lead: Sequence[Any]) -> list[Node]:
    """The op's arguments from weight_dq to rope_cos."""
    weight_dq, weight_dkv_kr, weight_uq_qr = (npu("npu::npu_format_cast", getattr(a, name), FRACTAL_NZ) for name in _WEIGHTS)
    gammas = [b.contiguous(a.q_norm_weight), b.contiguous(a.kv_norm_weight)]
    cos, sin = (_table(b, a, table, lead) for table in (a.cos, a.sin))
    return [weight_dq, weight_uq_qr, b.contiguous(a.k_b_weight), weight_dkv_kr, *gammas, sin, cos]


def _table(b: Builder, a: Arguments, table: Node, lead: Sequence[Any]) -> Node:
    """cos or sin as [T, 64], one entry for each channel of the rotated halves."""
    dim = -3 if a.rope_heads_first else -2
    if b.val(table).dim() >= -dim:
        table = b.emit(aten.squeeze.dim, table, b.val(table).dim() + dim)
    width = b.val(table).shape[-1]
    if width == _SIZES["rope"] and a.layout == "interleaved":
        table = b.emit(aten.cat.default, [b.emit(aten.slice.Tensor, table, -1, start, None, 2) for start in (0, 1)], -1)
    elif width != _SIZES["rope"]:
        table = b.emit(aten.cat.default, [table, table], -1)
    shape = [*lead, _SIZES["rope"]]
    if not same_shape(to_shape(b.val(table).shape), to_shape(_val(size) for size in shape)):
        table = b.emit(aten.expand.default, table, shape)
    return b.contiguous(b.reshape(table, [-1, _SIZES["rope"]]))


def _val(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _options(b: Builder, a: Arguments) -> dict[str, Any]:
    """The op's named arguments but its caches."""

    def row(scale: Node | None) -> Node | None:
        return None if scale is None else b.contiguous(b.reshape(scale, [1, -1]))

    options: dict[str, Any] = {"rmsnorm_epsilon_cq": a.q_eps, "rmsnorm_epsilon_ckv": a.kv_eps}
    if a.q_b_scale is None:
        return options
    options |= {"dequant_scale_w_uq_qr": row(a.q_b_scale), "smooth_scales_cq": row(a.smooth), "weight_quant_mode": 1}
    if a.x_scale is not None:
        options |= {
            "dequant_scale_x": b.contiguous(b.reshape(a.x_scale, [-1, 1])),
            "dequant_scale_w_dq": row(a.q_a_scale),
            "dequant_scale_w_dkv_kr": row(a.kv_a_scale),
            "weight_quant_mode": 2,
        }
    return options


def _pages(b: Builder, x: Node) -> list[Node]:
    """Caches of latent and keys with a place for each token."""
    page, tokens = PAGES[-1], b.size(x, 0)
    if isinstance(tokens, int):
        blocks: Any = -(-tokens // page)
    else:
        blocks = b.emit(operator.floordiv, b.emit(operator.add, tokens, page - 1), page)
    device = b.val(x).device
    sizes = (_SIZES["latent"], _SIZES["rope"])
    return [b.emit(aten.empty.memory_format, [blocks, page, 1, size], dtype=torch.bfloat16, device=device) for size in sizes]


def _range(b: Builder, x: Node) -> Node:
    """The places of the tokens: 0, 1, 2, ..."""
    tokens, device = b.size(x, 0), b.val(x).device
    if isinstance(tokens, int):
        return b.constant(("range", tokens, device), lambda: torch.arange(tokens, device=device))
    return b.emit(aten.arange.default, tokens, dtype=torch.int64, device=device)


def _rows(b: Builder, cache: Node, x: Node) -> Node:
    """What a cache of its own holds of the tokens: [T, size]."""
    size = b.val(cache).shape[-1]
    rows = b.emit(aten.view.default, cache, [-1, size])
    return b.emit(aten.slice.Tensor, rows, 0, 0, b.size(x, 0))


def _interleaved(b: Builder, halves: Node) -> Node:
    """Channels in pairs of neighbours, of those in halves."""
    shape = [b.size(halves, dim) for dim in range(b.val(halves).dim())]
    pairs = b.transpose(b.reshape(halves, [*shape[:-1], 2, shape[-1] // 2]), -1, -2)
    return b.reshape(pairs, shape)


# -------------------------------------------------------------------- into the model's caches


@dataclass(frozen=True)
class _Fresh:
    """A write of what the op computed into pages of its own.

    Attributes:
        write: the write.
        call: of npu_mla_prolog_v3_functional.
        place: the number of the result that is written.
        read_elsewhere: whether something but the write reads it.
        chain: what the write reads, back to the result.
    """

    write: RowWrite
    call: Node
    place: int
    read_elsewhere: bool
    chain: list[Node]


def _fresh(b: Builder, write: RowWrite) -> _Fresh | None:
    chain = list(shapes_of(b, write.source))
    if chain[-1].target is aten.slice.Tensor:  # the places of the tokens, of whole pages
        chain += list(shapes_of(b, chain[-1].args[0]))  # type: ignore[arg-type]
    result = chain[-1]
    if result.target is not operator.getitem or getattr(result.args[0].target, "_opname", "") != FUNCTIONAL.removeprefix("npu::"):  # type: ignore[union-attr]
        return None
    own = {*chain, write.node}
    elsewhere = any(user not in own for node in chain for user in node.users)
    return _Fresh(write, result.args[0], int(result.args[1]), elsewhere, chain)  # type: ignore[arg-type]


@writes(PROLOG, count=2, rank=-2)
def prolog_into_caches(b: Builder, group: Sequence[RowWrite], npu: Npu) -> Absorbed:
    """The op again, with the model's caches in place of pages of its own."""
    found = [_fresh(b, write) for write in group]
    b.only_if(len(found) == 2 and all(fresh is not None for fresh in found))
    latent, keys = sorted((fresh for fresh in found if fresh is not None), key=lambda fresh: fresh.place)
    b.only_if(latent.call is keys.call and latent.place < keys.place)
    b.require(
        not latent.read_elsewhere and not keys.read_elsewhere, "what it would write is read elsewhere too, and it does not give it back"
    )
    b.require(not latent.write.fractal, "the caches are fractal")
    rows = product((latent.write.prefix, latent.write.length))
    page = next((page for page in PAGES if isinstance(rows, int) and rows % page == 0), None)
    b.require(page is not None, f"the caches have {rows} places, which are no pages of {' or '.join(map(str, PAGES))}")
    b.require(b.at_least(rows, b.val(latent.call.args[0]).shape[0]), "there may be more tokens to write than the cache has")  # type: ignore[arg-type]
    index = b.cast(slots_of(b, latent.write), torch.int64)
    caches = [b.emit(aten.view.default, fresh.write.cache, [-1, page, 1, fresh.write.row]) for fresh in (latent, keys)]
    options = {name: value for name, value in latent.call.kwargs.items() if name != "cache_index"}
    query, query_rope, *_ = npu(PROLOG, *latent.call.args[:9], *caches, cache_index=index, **options)
    results = {user.args[1]: user for user in latent.call.users}
    instead = {results[place]: new for place, new in ((0, query), (1, query_rope)) if place in results}
    computed = [*latent.chain, *keys.chain, *instead, *(user for old in instead for user in old.users)]
    return Absorbed(instead, calls_of(computed))
