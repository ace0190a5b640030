"""Weights of all experts, [T, E]: what each token gives each expert's result, 0 where the expert was not chosen.

    zeros.scatter(1, ids, weights)
    (one_hot(ids, E) * weights[..., None]).sum(1)
    sigmoid(full(-inf).scatter(1, ids, logits))              # llama4

Each is k weights a token and their places. One that was written in any other way may be of any number of experts, and is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from npu_fusion.pattern import AttrIs, Pattern, State, any_of, op, op_any_args, opt_cast, reshape, sigmoid, sum_, torch_op, var
from npu_fusion.view import Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, normal_dim, same_shape


def _scattered(number: float, source: Pattern) -> Pattern:
    full = op_any_args("full", value=AttrIs(str(number), lambda value, _: value == number))
    last = AttrIs("the last dimension", lambda dim, value: normal_dim(dim, value.ndim) == value.ndim - 1)
    return torch_op("scatter", full, var("ids"), source, dim=last, overload="src", tensors="self index src")


def _is_column(view: Value) -> bool:
    """Whether a reshape gives each number a dimension of its own: [T, k] as [T, k, 1]."""
    return same_shape(view.shape, (*view.args[0].shape, 1))


_column_of_ids = reshape(var("ids")).where(_is_column, "the ids are not one for each chosen expert")
_column_of_weights = reshape(opt_cast(var("weights"))).where(_is_column, "the weights are not one for each chosen expert")
_one_hot = opt_cast(op("eq", _column_of_ids, op("arange", 0, 1), commutative=True))
_weighted = op("mul", _one_hot, opt_cast(_column_of_weights), commutative=True)
_summed = sum_(opt_cast(_weighted), dims=AttrIs("those chosen", lambda dims, value: dims == (value.ndim - 2,)))

_MATRIX = opt_cast(
    any_of(
        _scattered(0.0, opt_cast(var("weights"))).as_("scattered"),
        sigmoid(opt_cast(_scattered(float("-inf"), op("getitem", op_any_args("topk").as_("choice"), index=0)))).as_("scattered"),
        _summed,
    )
)


@dataclass(frozen=True)
class Combined:
    """The weights of all experts.

    Attributes:
        matrix: [T, E], or [T, 1, E] as a sum over those chosen leaves it.
        ids: [T, k].
        weights: [T, k]; None where they are known in the matrix alone.
    """

    matrix: Value
    ids: Value
    weights: Value | None

    def values(self, canon: Canon) -> Value:
        """The weights of those chosen, [T, k]."""
        if self.weights is not None:
            return self.weights
        attrs = {"dim": 1, "sparse_grad": False, "overload": "default", "@self": 1, "@index": 1}
        return canon.table.intern("gather", (self.matrix, self.ids), attrs, self.ids.shape, self.matrix.dtype)


def combined(matrix: Value) -> Combined | None:
    """How the weights of all experts are made, or None where that is not known."""
    state = State()
    for _ in _MATRIX.match(matrix, state):
        ids, weights = state.bindings["ids"], state.bindings.get("weights")
        # Of two equal ids a scatter keeps one: those of a top-k are all different.
        if "scattered" in state.bindings and not _are_distinct(ids):
            continue
        if "choice" in state.bindings and ids.args[0] is not state.bindings["choice"]:
            continue
        paired = weights is None or same_shape(weights.shape, ids.shape)
        if paired and ids.ndim == 2 and known_equal(ids.shape[0], matrix.shape[0]):
            return Combined(matrix, ids, weights)
    return None


def _are_distinct(ids: Value) -> bool:
    while ids.op == "cast":
        ids = ids.args[0]
    if ids.op != "getitem" or ids.attrs["index"] != 1 or ids.args[0].op != "topk":
        return False
    choice = ids.args[0]
    return normal_dim(choice.attrs["dim"], choice.args[0].ndim) == choice.args[0].ndim - 1
