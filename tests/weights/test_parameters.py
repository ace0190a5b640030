"""The model stays right whatever happens to its parameters once their memory is shared."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import UnsupportedInputError, torch_private
from tests.weights.models import HIDDEN, INNER, Attention, Compiled, Mlp, Model, Wide, frozen, gate_and_up, inputs, is_merged, linear

# -------------------------------------------------------------------- what happens to parameters afterwards


def test_rebound_data(compiled: Compiled) -> None:
    """`parameter.data = ...`, with the merged weight still alive: silently wrong, if nobody looks."""
    compiled.model.mlp.up_proj.weight.data = torch.randn(INNER, HIDDEN)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_rebound_to_its_own_transpose() -> None:
    """The address stays the same."""
    model = frozen(Wide(linear(HIDDEN), linear(HIDDEN)))
    compiled = Compiled(model)
    compiled.check()
    model.first.weight.data = model.first.weight.data.t()
    compiled.check()


def test_rebound_to_a_part_of_itself() -> None:
    """The addresses stay the same, and the memory stays adjacent."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(bias=False), linear(bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sigmoid().sum(-1, keepdim=True) * self.second(x)

    compiled = Compiled(frozen(Product()))
    compiled.check()
    compiled.model.second.weight.data = compiled.model.second.weight.data[:8]
    if not torch_private.GUARDS_PARAMETERS:  # better an error than the weight as it was
        with pytest.raises(UnsupportedInputError, match=r"rebound to another shape.*torch.compiler.reset"):
            compiled.check()
        return
    compiled.check()
    compiled.model.first.weight.data = compiled.model.first.weight.data[:8]
    compiled.check()


def test_swapped_data(compiled: Compiled) -> None:
    gate, up = gate_and_up(compiled.model)
    gate.data, up.data = up.data, gate.data
    compiled.check()


def test_written_in_place(compiled: Compiled) -> None:
    gate, up = gate_and_up(compiled.model)
    gate.mul_(2)
    up.data.copy_(torch.randn(INNER, HIDDEN))
    compiled.check()
    assert is_merged(gate, up)


def test_load_state_dict(compiled: Compiled) -> None:
    compiled.model.load_state_dict(Model().state_dict())
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_load_state_dict_assign(compiled: Compiled) -> None:
    compiled.model.load_state_dict(frozen(Model()).state_dict(), assign=True)
    frozen(compiled.model)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_parameter_replaced(compiled: Compiled) -> None:
    compiled.model.mlp.gate_proj.weight = nn.Parameter(torch.randn(INNER, HIDDEN), requires_grad=False)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_moved_to_another_dtype_and_back(compiled: Compiled) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compiled.model.to(dtype)
        assert not is_merged(*gate_and_up(compiled.model))
        compiled.check()
        assert is_merged(*gate_and_up(compiled.model))


@pytest.mark.gpu
def test_moved_to_another_device_and_back(compiled: Compiled) -> None:
    for device in ("cuda", "cpu"):
        compiled.model.to(device)
        compiled.check(inputs().to(device))
        assert is_merged(*gate_and_up(compiled.model))


def test_deep_copy(compiled: Compiled) -> None:
    twin = Compiled(copy.deepcopy(compiled.model))
    assert not is_merged(*gate_and_up(twin.model))
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(1)
    twin.check()
    compiled.check()
    twin.check()
    assert is_merged(*gate_and_up(twin.model))
    assert not is_merged(gate_and_up(twin.model)[0], gate_and_up(compiled.model)[1])


def test_save_and_load(compiled: Compiled, tmp_path: Path) -> None:
    torch.save(compiled.model.state_dict(), tmp_path / "model.pt")
    other = frozen(Model())
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(other(x), compiled.model(x))
    compiled.check()


def test_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=50
    )
    model = frozen(transformers.LlamaForCausalLM(config))
    tokens = torch.randint(50, (1, 6))
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, backend="npu_fusion")(tokens).logits
    layer = model.model.layers[0]
    assert is_merged(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert size < 1.2 * sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected)
        torch.testing.assert_close(compiled, expected)


def test_tied_embedding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(INNER, HIDDEN)
            self.mlp = Mlp()
            self.mlp.gate_proj.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x + self.embedding.weight.mean(0))

    compiled = Compiled(frozen(Language()))
    compiled.check()
    assert compiled.model.embedding.weight is compiled.model.mlp.gate_proj.weight
    compiled.model.embedding.weight.add_(1)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


# -------------------------------------------------------------------- memory that others refer to


def test_state_dict_that_is_held_sees_the_model_and_the_model_it() -> None:
    model = frozen(Model())
    held = model.state_dict()
    compiled = Compiled(model)
    compiled.check()
    held["mlp.up_proj.weight"].zero_()
    assert not model.mlp.up_proj.weight.any()
    compiled.check()
    assert not is_merged(*gate_and_up(model))


def test_weight_that_is_held_when_it_must_move(compiled: Compiled, caplog: pytest.LogCaptureFixture) -> None:
    up = compiled.model.mlp.up_proj.weight
    held = torch.randn(INNER, HIDDEN)
    up.data = held
    with caplog.at_level(logging.WARNING, logger="npu_fusion.weights"):
        compiled.check()
        held.zero_()
        compiled.check()
    assert not is_merged(*gate_and_up(compiled.model))
    assert sum("concatenated at every call" in record.message for record in caplog.records) == 1
    del held
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_memory_of_numpy() -> None:
    model = frozen(Model())
    array = torch.randn(INNER, HIDDEN).numpy()
    model.mlp.up_proj.weight.data = torch.from_numpy(array)
    compiled = Compiled(model)
    compiled.check()
    array[:] = 0
    assert not model.mlp.up_proj.weight.any()
    compiled.check()


def test_memory_shared_between_processes() -> None:
    model = frozen(Model()).share_memory()
    Compiled(model).check()
    assert all(parameter.is_shared() for parameter in model.parameters())


# -------------------------------------------------------------------- several graphs, several models


def test_graphs_of_two_shapes_share_the_merged_weights(compiled: Compiled) -> None:
    gate, _ = gate_and_up(compiled.model)
    address = gate.data_ptr()
    compiled.check(inputs(1, 1))
    compiled.check(inputs(2, 5))
    assert len(compiled.records) == 2
    assert gate.data_ptr() == address


def test_two_models_share_a_graph() -> None:
    both = [Compiled(frozen(Model())), Compiled(frozen(Model()))]
    for _ in range(2):
        for compiled in both:
            compiled.check()
    assert all(is_merged(*gate_and_up(compiled.model)) for compiled in both)


def test_graphs_that_want_another_order() -> None:
    """The first graph's order stays; the second concatenates."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return self.second(x).sigmoid() + self.first(x)
            return self.first(x).sigmoid() + self.second(x)

    compiled = Compiled(frozen(Either()))
    for rows in (2, 1, 2, 1):
        compiled.check(inputs(rows, 3))
    assert is_merged(compiled.model.first.weight, compiled.model.second.weight)


def test_parts_of_a_merged_weight_are_one_too() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return self.attention.k_proj(x).sigmoid() * self.attention.v_proj(x)
            return self.attention(x)

    compiled = Compiled(frozen(Keys()))
    for rows in (2, 1, 2):
        compiled.check(inputs(rows, 3))
    attention = compiled.model.attention
    assert is_merged(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)


def test_model_is_freed() -> None:
    compiled = Compiled(frozen(Model()))
    compiled.check()
    storage = weakref.ref(gate_and_up(compiled.model)[0].untyped_storage())
    torch.compiler.reset()
    del compiled
    gc.collect()
    assert storage() is None
