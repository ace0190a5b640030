"""Matrix products on Ascend: `npu_transpose_batchmatmul`, which reads [M, H, K] and writes [M, H, N] where a batched product would have its
operand transposed before it and its result after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...layout import needs_layout, row_major
from ...lower import Arguments, Builder
from ...view.shapes import known_equal, product, to_dim
from .provide import Npu, provides

aten = torch.ops.aten
_INNER = 65535  # the largest H * K of a transposed input


@provides("bmm_transpose", "npu::npu_transpose_batchmatmul")
def bmm_transpose(b: Builder, a: Arguments, npu: Npu) -> Node:
    """y[..., h, n] = sum_k x[..., h, k] * weight[h, k, n]."""
    x, weight = a.x, a.weight
    b.require(a.row_major or not needs_layout(b.node), "somebody relies on the heads lying outermost, and it writes rows")
    heads, inner, columns = b.val(weight).shape
    b.require(isinstance(heads, int) and isinstance(inner, int) and isinstance(columns, int), "the sizes of the weight are symbolic")
    b.require(known_equal(to_dim(b.val(weight).stride(-1)), 1), "the weight is stored transposed, and would be copied for each call")
    rows: list[Any] = [b.size(x, dim) for dim in range(b.val(x).dim() - 2)]
    source = _head_major_source(b, x)
    if source is not None:
        y = npu("npu::npu_transpose_batchmatmul", source, weight, perm_x1=[0, 1, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    else:
        b.require(b.at_least(_INNER, product((heads, inner))), f"{heads} heads of {inner} are more than {_INNER} numbers a row")
        flat = x if len(rows) == 1 else b.emit(aten.reshape.default, x, [-1, heads, inner])
        y = npu("npu::npu_transpose_batchmatmul", flat, weight, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    return y if len(rows) == 1 else b.reshape(y, [*rows, heads, columns])


def _head_major_source(b: Builder, x: Node) -> Node | None:
    """Where x [M, H, K] is a transposition of a contiguous [H, M, K], that."""
    if x.target is not aten.transpose.int or b.val(x).dim() != 3:
        return None
    source = b.transpose(x, 0, 1)
    return source if source is x.args[0] and row_major(b.val(source)) else None
