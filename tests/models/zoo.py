"""Every causal language model of the installed transformers that a tiny random configuration builds, with inputs for both phases.

    model = build("llama", torch.bfloat16, "sdpa")
    inputs = decode_inputs(model, batch=2, past=12)
    sites = executed_sites(model, inputs)           # Counter(rms_norm=5, residual_add=4, rope=4, glu=2, attention=2)
    logits, next_logits = run(model, inputs)
    exact, next_exact = run_float64(model, inputs)

Each of these leaves `model` and `inputs` as they were, though a forward pass writes to the cache in them: passes run on copies. Nothing
here imports npu_fusion.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configs import VOCABULARY, has_parts, tiny_config
from .float64 import Float64Mode, to_float64
from .sites import EXPERT_COUNTS, SiteCounter

MAX_CACHE_LEN = 64
FIRST_TOKEN = 3  # beyond the padding, begin and end tokens
CACHE_ARGUMENTS = ("past_key_values", "cache_params")
STATE_ARGUMENTS = ("past_buckets_states", "mems")

# Their `past_key_values` is no StaticCache: a decode step grows a DynamicCache, or what the model made itself.
NO_STATIC_CACHE = frozenset({"deepseek_v4", "inkling2_text", "inkling_text", "minimax", "prophetnet", "xlstm"})
# They cannot go on from a past (cpmant puts its prompt before the new token again, rwkv mixes the rows of a batch): a decode step sees the
# whole sequence.
NO_CACHE = frozenset({"cpmant", "rwkv"})


def architectures() -> list[str]:
    """The `model_type` names of all architectures of the zoo, sorted.

    Left out are those put together from a text model and others (images, audio) or an encoder: the text model stands for itself.
    """
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not has_parts(CONFIG_MAPPING[name]))


def routed_or_latent() -> list[str]:
    """Those of the zoo that have experts or latent attention, by the fields of their configurations."""
    wanted = {*EXPERT_COUNTS, "kv_lora_rank"}
    return [name for name in architectures() if wanted & {field.name for field in dataclasses.fields(CONFIG_MAPPING[name])}]


def build(model_type: str, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """A tiny model with random weights, in eval mode and without gradients; the same weights, up to rounding, for every dtype.

    Vectors (norm weights, biases) are moved off the ones and zeros they are initialised with, so that forgetting one shows.
    """
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exact: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
        for parameter in exact.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        if dtype is torch.float32:
            return exact.eval().requires_grad_(False)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.load_state_dict(exact.state_dict())
    _keep_in_float32(model, exact)
    return model.eval().requires_grad_(False)


def _keep_in_float32(model: nn.Module, exact: nn.Module) -> None:
    """Does what `from_pretrained` does and `from_config` does not: leaves in float32 the weights that the model names for it."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    wanted = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names) or r"(?!)")
    values = exact.state_dict()
    for name, parameter in model.named_parameters():
        if wanted.search(name):
            parameter.data = values[name]
    for name, buffer in model.named_buffers():
        if wanted.search(name) and name in values:
            buffer.data = values[name]


def prefill_inputs(model: nn.Module, batch: int, seq: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass over `seq` new tokens a row, with an empty cache where the model takes a static one."""
    inputs: dict[str, Any] = {"input_ids": _tokens(model, batch, seq, seed)}
    cache = _static_cache(model, batch)
    if cache is not None:
        inputs[_cache_argument(model)] = cache
        inputs["use_cache"] = True
    return inputs


def decode_inputs(model: nn.Module, batch: int, past: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass over one new token a row after `past` others.

    The past is in a static cache where the model takes one, else in a dynamic cache or whatever state the model returns. A model without
    any gets the whole sequence.
    """
    tokens = _tokens(model, batch, past + 1, seed)
    if _model_type(model) in NO_CACHE:
        return {"input_ids": tokens, "use_cache": False}
    inputs = prefill_inputs(model, batch, past, seed)
    inputs["input_ids"] = tokens[:, :past]
    with torch.no_grad():
        outputs = model(**inputs, **({} if "use_cache" in inputs or not _takes(model, "use_cache") else {"use_cache": True}))
    for name in CACHE_ARGUMENTS + STATE_ARGUMENTS:
        state = getattr(outputs, name, None)
        if state is not None and _takes(model, name):
            return {"input_ids": tokens[:, past:], name: state, "use_cache": True}
    return {"input_ids": tokens}


def executed_sites(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    """How often each idiom occurs in one eager forward pass: see `SiteCounter`."""
    model, inputs = copy.deepcopy((model, inputs))
    with torch.no_grad(), SiteCounter(model) as counter:
        model(**inputs)
    return counter.sites


def run(model: nn.Module, inputs: dict[str, Any], wrap: Callable[[nn.Module], Callable[..., Any]] | None = None) -> list[Tensor]:
    """The logits of one forward pass, and of an eager step after it.

    The step is there when the inputs hold a cache, and shows what the pass wrote to it.

    Args:
        wrap: turns the model into what computes the pass, e.g. `lambda model: torch.compile(model, backend="npu_fusion")`.
    """
    model, inputs = copy.deepcopy((model, inputs))
    with torch.no_grad():
        return _pass_and_step(model, wrap(model) if wrap else model, inputs)


def run_float64(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What `run` returns, computed in float64 throughout from the weights, tables and cache as they are."""
    model, inputs = copy.deepcopy((model, inputs))
    model, inputs = to_float64(model), to_float64(inputs)
    with torch.no_grad(), Float64Mode():
        return _pass_and_step(model, model, inputs)


def _pass_and_step(model: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    results = [forward(**inputs).logits]
    if any(name in inputs for name in CACHE_ARGUMENTS):
        results.append(model(**{**inputs, "input_ids": inputs["input_ids"][:, -1:]}).logits)
    return results


def _tokens(model: nn.Module, batch: int, seq: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    return torch.randint(FIRST_TOKEN, VOCABULARY, (batch, seq), generator=generator).to(device)


def _model_type(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _cache_argument(model: nn.Module) -> str:
    return next(name for name in CACHE_ARGUMENTS if _takes(model, name))


def _static_cache(model: nn.Module, batch: int) -> StaticCache | None:
    """An empty static cache whose tensors are there already, or None for a model that takes none."""
    takes_cache = any(_takes(model, name) for name in CACHE_ARGUMENTS)
    if not takes_cache or _model_type(model) in NO_STATIC_CACHE | NO_CACHE:
        return None
    config: Any = model.config
    cache = StaticCache(config, max_cache_len=MAX_CACHE_LEN)
    with torch.no_grad():
        model(input_ids=_tokens(model, batch, 1, 0), use_cache=True, **{_cache_argument(model): cache})
    cache.reset()
    return cache
