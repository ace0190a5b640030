"""Attention on CUDA: which calls torch's kernels take, which ours, what is refused and why, and the numbers of what they become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_fusion
from npu_fusion.backend import FusionBackend
from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.attention import attention, mla_attention
from npu_fusion.semantic import SemanticOp
from tests.lowerings.ascend.checks import Lowered, lower_call
from tests.ops.checks import assert_same_metadata

FP16, FP32 = torch.float16, torch.float32
CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}
OURS, TORCHS = "triton.attention", "sdpa"
ATTENTION, BOUNDS = "npu_fusion_triton.attention", "npu_fusion_triton.mask_bounds"


def qkv(queries: int, keys: int, *, heads: int = 4, width: int = 32, dtype: torch.dtype = FP16) -> list[Tensor]:
    """Two sequences, two key heads; stored token-major, as projections leave them."""
    sizes = (2, queries, heads, width), (2, keys, 2, width), (2, keys, 2, width)
    return [torch.randn(size, dtype=dtype).transpose(1, 2) for size in sizes]


def lowered(
    *inputs: Tensor, op: SemanticOp = attention, others: dict[str, Tensor] | None = None, config: Any = None, **options: Any
) -> Lowered:
    """A call of the op with further tensors by name, held to the numeric contract and to the memory layout of the semantic op."""
    names = () if others is None else tuple(others)

    def fn(*values: Tensor) -> Tensor:
        result: Tensor = op(*values[: len(inputs)], scale=0.2, **dict(zip(names, values[len(inputs) :])), **options)
        return result

    given = (*inputs, *(others or {}).values())
    found = lower_call(fn, *given, **CUDA, **(config or {}))
    actual, eager = found.gm(*given), fn(*given)
    truth = fn(*(x.double() if x.is_floating_point() else x for x in given))
    assert_same_metadata(actual, eager)
    assert_within_contract(actual, eager, truth, inputs[0].dtype)
    return found


# -------------------------------------------------------------------- few queries


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_decode(dtype: torch.dtype) -> None:
    found = lowered(*qkv(1, 40, dtype=dtype))
    assert (found.provider, found.targets()) == (OURS, [ATTENTION])


def test_decode_into_a_static_cache() -> None:
    """A mask that only a tensor knows: its bounds are found first, so that no more is read than is filled."""
    keys = torch.arange(90)
    seen = (keys <= torch.tensor([[33], [5]]))[:, None, None, :]
    found = lowered(*qkv(1, 90), others={"mask": seen})
    assert (found.provider, found.reason) == (OURS, "")
    assert found.targets() == [BOUNDS, ATTENTION]
    added = torch.zeros(2, 1, 1, 90, dtype=FP16).masked_fill(~seen, torch.finfo(FP16).min)
    assert lowered(*qkv(1, 90), others={"mask": added}).targets() == [BOUNDS, ATTENTION]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_pages(index: torch.dtype) -> None:
    query, _, _ = qkv(1, 1)
    pages = [torch.randn(5, 16, 2, 32, dtype=FP16).transpose(1, 2) for _ in range(2)]
    paging = {"kv_lengths": torch.tensor([30, 3], dtype=index), "block_table": torch.tensor([[4, 0], [2, -1]], dtype=index)}
    assert lowered(query, *pages, others=paging).targets() == [ATTENTION]


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"window": 7, "is_causal": True, "causal_offset": 36}, {"out_dtype": FP32}])
def test_options(options: dict[str, Any]) -> None:
    assert lowered(*qkv(2, 40), **options).targets() == [ATTENTION]


def test_sinks() -> None:
    assert lowered(*qkv(1, 40), others={"sinks": torch.randn(4, dtype=FP16)}).targets() == [ATTENTION]


@pytest.mark.parametrize("with_sinks", [False, True])
def test_weights_stay_wide_where_the_model_is_followed_exactly(with_sinks: bool) -> None:
    """With softcap or sinks the model's softmax is fp32; of fp32 inputs it is here too."""
    others = {"sinks": torch.randn(4, dtype=FP16)} if with_sinks else {}
    options = {} if with_sinks else {"softcap": 3.0}
    found = lowered(*qkv(1, 40), others=others, config={"rounding": "exact"}, **options)
    assert found.provider == REFERENCE
    assert "it rounds the softmax to 16 bits" in found.reason
    others = {name: sinks.float() for name, sinks in others.items()}
    assert lowered(*qkv(1, 40, dtype=FP32), others=others, config={"rounding": "exact"}, **options).provider == OURS


# -------------------------------------------------------------------- many queries


@pytest.mark.parametrize(
    ("sizes", "options", "causal"),
    [
        ((40, 40), {}, "none"),
        ((40, 40), {"is_causal": True}, "upper_left"),
        ((40, 50), {"is_causal": True}, "upper_left"),
        ((40, 50), {"is_causal": True, "causal_offset": 10}, "lower_right"),
        ((40, 30), {}, "none"),
    ],
)
def test_torch_computes_what_it_has_kernels_for(sizes: tuple[int, int], options: dict[str, Any], causal: str) -> None:
    found = lowered(*qkv(*sizes), **options)
    assert found.provider == TORCHS
    [call] = found.gm.graph.find_nodes(op="call_function", target=torch.ops.npu_fusion_triton.sdpa.default)
    assert call.kwargs["causal"] == causal
    assert lowered(*qkv(*sizes), out_dtype=FP32, **options).provider == TORCHS


def test_symbolic_sizes() -> None:
    """How many queries there are is not known: torch's kernels take them; ours are compiled for a head dimension."""
    square = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2, is_causal=True), *qkv(40, 40), dynamic=True, **CUDA)
    assert square.targets() == ["npu_fusion_triton.sdpa"]
    windowed = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2, window=9), *qkv(40, 40), dynamic=True, **CUDA)
    assert (windowed.provider, windowed.reason) == (REFERENCE, "triton.attention: head_dim is symbolic: a kernel is compiled for it")


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "causal_offset": 3},
        {"is_causal": True, "causal_offset": -2},
        {"is_causal": True, "window": 9},
        {"softcap": 2.0},
    ],
)
def test_other_forms_are_ours(options: dict[str, Any]) -> None:
    found = lowered(*qkv(40, 50), **options)
    assert (found.provider, found.targets()[-1]) == (OURS, ATTENTION)


def test_prompt_into_a_static_cache() -> None:
    seen = torch.ones(40, 60, dtype=torch.bool).tril() & (torch.arange(60) >= torch.tensor([[0], [4]]))[:, None, None, :]
    assert lowered(*qkv(40, 60), others={"mask": seen}).targets() == [BOUNDS, ATTENTION]


# -------------------------------------------------------------------- latent attention


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("heads_of_rope", [1, 4])
def test_mla(queries: int, heads_of_rope: int) -> None:
    shapes = (2, 4, queries, 32), (2, 4, queries, 16), (2, 4, 30, 32), (2, heads_of_rope, 30, 16), (2, 4, 30, 24)
    inputs = [torch.randn(shape, dtype=FP16) for shape in shapes]

    found = lowered(*inputs, op=mla_attention, is_causal=True, causal_offset=30 - queries)
    assert (found.provider, found.targets()) == (OURS, [ATTENTION])


def test_absorbed_mla_reads_its_latent_once() -> None:
    inputs = [torch.randn(2, n, s, d, dtype=FP16) for n, s, d in ((4, 1, 512), (4, 1, 64), (1, 30, 512), (1, 30, 64))]

    def absorbed(q_nope: Tensor, q_rope: Tensor, cache: Tensor, k_rope: Tensor) -> Tensor:
        attended: Tensor = mla_attention(q_nope, q_rope, cache, k_rope, cache, scale=0.04)
        return attended

    found = lower_call(absorbed, *inputs, **CUDA)
    assert_within_contract(found.gm(*inputs), absorbed(*inputs), absorbed(*(x.double() for x in inputs)), FP16)
    assert (found.provider, found.targets()) == (OURS, [ATTENTION])
    [call] = [node for node in found.gm.graph.nodes if node.op == "call_function"]
    assert call.args[2] is None


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        (qkv(1, 8, width=264), {}, "head_dim is 264, and 256 at most fits"),
        (qkv(1, 8, dtype=torch.float64), {}, "query is torch.float64"),
        (qkv(40, 40, dtype=FP32), {"softcap": 2.0}, "for many queries it takes fp16 and bf16"),
    ],
)
def test_refused(inputs: list[Tensor], options: dict[str, Any], reason: str) -> None:
    found = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2, **options), *inputs, **CUDA)
    assert found.provider == REFERENCE
    assert f"triton.attention: {reason}" in found.reason


def test_ascend_keeps_its_own_op() -> None:
    """What Ascend's ops take they keep; softcap they have not."""
    call = {"target": "ascend910b", "emulate": True}
    plain = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2), *qkv(1, 8), **call)
    assert "npu_fused_infer_attention_score" in plain.provider
    capped = lower_call(lambda q, k, v: attention(q, k, v, scale=0.2, softcap=2.0), *qkv(1, 8), **call)
    assert (capped.provider, capped.targets()) == (OURS, [ATTENTION])


# -------------------------------------------------------------------- a model


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, caches: list[Tensor], at: Tensor) -> Tensor:
        seen = (torch.arange(caches[0].shape[2], device=x.device) <= at[:, None])[None, None]
        for layer, keys, values in zip(self.layers, caches[::2], caches[1::2]):
            x = layer(x, keys, values, at, seen)
        return x


def test_model_with_a_static_cache() -> None:
    """Both layers run the kernel, and the bounds of their mask are found once."""
    model, x, at = Decoder().eval(), torch.randn(2, 1, 64), torch.tensor([11])
    caches = [torch.randn(2, 2, 32, 16) for _ in range(4)]
    backend = FusionBackend(npu_fusion.FusionConfig(**CUDA, executor="eager"))
    with torch.no_grad():
        expected = model(x, [cache.clone() for cache in caches], at)
        actual = torch.compile(model, backend=backend, fullgraph=True)(x, [cache.clone() for cache in caches], at)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    [record] = backend.records
    calls = [str(node.target) for node in record.stages["lowered"].graph.nodes]
    assert (calls.count(f"{ATTENTION}.default"), calls.count(f"{BOUNDS}.default")) == (2, 1)
