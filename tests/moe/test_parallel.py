"""transformers' MoE models, expert-parallel over gloo processes, equal the model of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import npu_fusion
from npu_fusion import moe

from .ranks import Ranks
from .soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("moe")]

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def model(name: str, dtype: torch.dtype, layers: int = 2) -> Any:
    import transformers as t

    sizes = {**_SIZES, "num_hidden_layers": layers}

    if name == "qwen3":
        config: Any = t.Qwen3MoeConfig(**sizes, head_dim=8, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
        made: Any = t.Qwen3MoeForCausalLM(config)
    elif name == "mixtral":
        config = t.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        made = t.MixtralForCausalLM(config)
    elif name == "gpt_oss":
        config = t.GptOssConfig(**sizes, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
        made = t.GptOssForCausalLM(config)
    else:
        sizes["num_key_value_heads"] = 4
        config = t.DeepseekV3Config(
            **sizes, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1, moe_intermediate_size=16, n_shared_experts=1,
            first_k_dense_replace=layers - 1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
        made = t.DeepseekV3ForCausalLM(config)
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.to(dtype).eval()


def same_as_alone(name: str, dtype: torch.dtype, backend: str | None, adversarial: bool, max_tokens: int | None) -> None:
    layers = 2 if backend is None else 1
    alone = model(name, dtype, layers)
    if adversarial:  # all tokens to the same experts
        for module in alone.modules():
            if type(module).__name__.endswith("Router"):
                module.weight.data.zero_()
    shared = moe.expert_parallel(model(name, dtype, layers), max_tokens=max_tokens)
    shared.load_state_dict({k: v for k, v in alone.state_dict().items() if ".experts." not in k}, strict=False)
    tokens = 5 + (dist.get_rank() if max_tokens is not None else 0)
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(dist.get_rank()))
    run = shared if backend is None else torch.compile(shared, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected, actual = alone(ids, use_cache=False).logits, run(ids, use_cache=False).logits
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (actual - expected).float().norm() <= tolerance * expected.float().norm()


def same_gradients(name: str) -> None:
    """A rank's loss is of its own tokens; the experts' gradients are of all tokens, so that both ranks take the same ones here."""
    alone, shared = model(name, torch.float32), moe.expert_parallel(model(name, torch.float32))
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    for one in (alone, shared):
        one(ids, use_cache=False).logits.square().mean().backward()
    ranks = dist.get_world_size()
    theirs = dict(alone.named_parameters())
    for path, parameter in shared.named_parameters():
        reference = theirs[path].grad
        if ".experts." in path:
            local = reference.shape[0] // ranks
            reference = reference[dist.get_rank() * local :][:local] * ranks
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-5)


def placed() -> None:
    placement = torch.tensor([3, 1, 6, 0, 7, 2, 5, 4])
    alone, shared = model("qwen3", torch.float32), moe.expert_parallel(model("qwen3", torch.float32), placement=placement)
    ids = torch.randint(0, 64, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(shared(ids).logits, alone(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek", "gpt_oss"])
def test_two_ranks(two: Ranks, name: str) -> None:
    two.run(same_as_alone, name, torch.float32, None, False, 16)
    two.run(same_as_alone, name, torch.bfloat16, None, True, None)


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_two_ranks_compiled(two: Ranks, name: str) -> None:
    two.run(same_as_alone, name, torch.float32, "npu_fusion", False, 16)


def test_gradients(two: Ranks) -> None:
    two.run(same_gradients, "qwen3")


def test_placement(two: Ranks) -> None:
    two.run(placed)


def test_step_after_step(two: Ranks) -> None:
    """Nine steps have every form and routing; `python -m tests.moe.soak` takes a thousand, on more ranks."""
    two.run(soak, 9)


def test_four_ranks(four: Ranks) -> None:
    four.run(same_as_alone, "mixtral", torch.float32, None, False, 16)
    four.run(same_as_alone, "qwen3", torch.float32, None, True, None)


def test_a_model_without_experts_is_an_error(alone: str) -> None:
    with pytest.raises(npu_fusion.UnsupportedInputError, match="no modules of stacked experts"):
        moe.expert_parallel(torch.nn.Linear(2, 2), alone)
