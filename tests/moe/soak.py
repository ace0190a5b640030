"""Expert-parallel models, step after step, against the same model in one process: `python -m tests.moe.soak --ranks 8 --steps 1000`.

Every step has other tokens, unequally many on the ranks, and another kind of routing. A rank compares its own tokens with what a model with
all experts makes of them. What is printed is the greatest relative error (L2) of each form of the experts, and the seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npu_fusion import moe
from npu_fusion.moe import quantized

from .ranks import Ranks

MOST = 12  # tokens of a rank
ROUTING = ("random", "one", "absent")
FORMS: dict[str, tuple[torch.dtype, str, float]] = {
    "fp32": (torch.float32, "none", 1e-4),
    "bf16": (torch.bfloat16, "none", 3e-2),
    "int8": (torch.float32, "int8", 1e-4),
}
"""Names of forms to the dtype of the model, the format of rows on their way, and the greatest relative error.

Where rows travel quantised, the experts of the model in one process are given the rows as they arrive.
"""


def model(dtype: torch.dtype) -> Any:
    """A Qwen3-MoE of one layer and 16 experts, the same on all ranks."""
    import transformers as t

    torch.manual_seed(1)
    made = t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=64, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=16,
        )
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.to(dtype).eval()


def experts_of(made: Any) -> Any:
    return made.model.layers[0].mlp.experts


def by_expert(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What transformers' stacked experts make of the choices; an id of no expert adds nothing."""
    y = torch.zeros_like(x)
    for expert in range(experts.gate_up_proj.shape[0]):
        weight = torch.where(ids == expert, weights, 0).sum(1, keepdim=True).to(x.dtype)
        gate, up = (x @ experts.gate_up_proj[expert].mT).chunk(2, dim=1)
        y += weight * ((torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].mT)
    return y


def as_they_arrive(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rows, scales = quantized.quantize_rows(args[0], "int8")
    assert scales is not None
    return (rows * scales, *args[1:])


def relative(actual: Tensor, expected: Tensor) -> float:
    scale = expected.float().norm().clamp(min=1e-6)
    return float((actual - expected).float().norm() / scale)


def soak(steps: int) -> dict[str, float]:
    """Greatest relative error of each form on this rank; raises AssertionError with the step at which one is too great."""
    rank = dist.get_rank()
    pairs = {}
    for form, (dtype, quant, _) in FORMS.items():
        pairs[form] = model(dtype), moe.expert_parallel(model(dtype), max_tokens=MOST, quant=quant)
    experts_of(pairs["int8"][0]).register_forward_pre_hook(as_they_arrive)
    worst = dict.fromkeys(FORMS, 0.0)
    for step in range(steps):
        form, kind = list(FORMS)[step % 3], ROUTING[step // 3 % 3]
        quant = FORMS[form][1]
        alone, shared = pairs[form]
        generator = torch.Generator().manual_seed(1000 * step + rank)
        tokens = 1 + (3 * rank + 5 * step) % MOST
        with torch.no_grad():
            if kind == "absent":  # choices that are none, and ranks without any tokens: what no router of a model gives
                x = torch.randn(tokens - 1, 32, generator=generator).to(FORMS[form][0])
                ids = torch.rand(tokens - 1, 16, generator=generator).topk(3).indices
                ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, -1, ids)
                weights = torch.rand(ids.shape, generator=generator).to(x.dtype)
                actual, expected = experts_of(shared)(x, ids, weights), by_expert(experts_of(alone), x, ids, weights)
                if quant != "none":
                    expected = by_expert(experts_of(alone), *as_they_arrive(None, (x, ids, weights)))
            else:
                gate = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)) * (kind == "random")
                for made in (alone, shared):  # zeros send all tokens of all ranks to the same experts, and none to the others
                    made.model.layers[0].mlp.gate.weight.copy_(gate)
                ids = torch.randint(0, 64, (1, tokens), generator=generator)
                actual, expected = shared(ids, use_cache=False).logits, alone(ids, use_cache=False).logits
        worst[form] = max(worst[form], relative(actual, expected))
        assert worst[form] <= FORMS[form][2], f"step {step}, {kind}, {form}: relative error {worst[form]:.2e}"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    ranks, start = Ranks(given.ranks), time.monotonic()
    try:
        found = ranks.run(soak, given.steps, timeout=3600.0)
    finally:
        ranks.close()
    worst = {form: max(one[form] for one in found) for form in FORMS}
    errors = ", ".join(f"{form} {error:.1e}" for form, error in worst.items())
    sys.stdout.write(f"{given.ranks} ranks, {given.steps} steps: {errors}; {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
