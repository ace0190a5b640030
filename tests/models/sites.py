"""Ground truth for coverage: how often each idiom occurs in an eager forward pass, counted without the compiler.

Counted by watching torch functions (`TorchFunctionMode`) and module calls (global hooks) while the model runs. Values are followed by
object: what is known of a tensor (it is an activation's output, a residual sum, attention weights) is kept under its `id`, and every tensor
seen is kept alive until the end, so that an `id` names one tensor.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

ROTATION = re.compile(r"^_?apply_.*(rotary|rope)(?!.*vision)")
NORM_FUNCTION = re.compile(r"^_?(rms_?norm|rms_forward|l2_?norm)")
ROUTING_FUNCTION = re.compile(r"^sparsemixer$")  # chooses by masked maxima, one expert after the other, without topk
EXPERTS_MODULE = re.compile(r"(?<!Shared)Experts$|MoeSharedExperts$")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")

# The same value in another layout, type or name.
SAME_VALUE = frozenset(
    "view reshape to type_as type float half bfloat16 double contiguous clone dropout transpose permute flatten unflatten unsqueeze "
    "squeeze swapaxes swapdims movedim expand expand_as alias detach view_as reshape_as".split()
)
# Part of the value, or the value masked or scaled: attention weights stay attention weights.
PART_OF_VALUE = SAME_VALUE | frozenset("__getitem__ chunk split narrow masked_fill where slice nan_to_num dropout1d".split())
PRODUCTS = frozenset("mul __mul__ __rmul__ multiply mul_ __imul__".split())
SUMS = frozenset("add __add__ __radd__ __iadd__ add_".split())
MATMULS = frozenset("matmul __matmul__ bmm baddbmm einsum".split())
ACTIVATIONS = frozenset(
    "silu silu_ gelu sigmoid sigmoid_ relu relu_ tanh tanh_ softplus leaky_relu elu mish hardswish hardsigmoid relu6 selu celu glu".split()
)
ACTIVATION_MODULES = re.compile(r"(Activation|GELU|SiLU|ReLU|Sigmoid|Tanh|Mish|Swish)")
ELEMENTWISE = PRODUCTS | SUMS | frozenset("clamp clamp_ neg sub __sub__ div __truediv__ pow __pow__ square erf exp minimum maximum".split())


@dataclass
class _Norm:
    """What was seen of a norm module while it ran."""

    module: nn.Module
    source: Tensor | None
    gated: bool
    means: int = 0
    done_by_torch: bool = False


class SiteCounter(TorchFunctionMode):
    """Context manager that counts sites of idioms in `sites` while one model runs eagerly.

    - rms_norm, gated_rms_norm, layer_norm: calls of a module with `Norm` in its class name that takes one mean (two: it is centred and
      counts as layer_norm), or of `rms_norm` or `layer_norm` of torch; l2_norm: calls of a function of that name, or of `F.normalize`.
    - residual_add: sums of two tensors of one shape that are the input of an RMSNorm without a gate; a sum that feeds two norms counts
      once, the sum inside a rotation does not count.
    - rope: tensors returned by the modeling file's `apply_rotary...` functions.
    - glu: products of an activation's output with a tensor of the same shape that is not the activation's own input. The product with a
      gate inside a gated norm belongs to the norm.
    - attention: `scaled_dot_product_attention` calls, and softmax outputs that go into a matrix product; mla_attention: those of a
      module with a `kv_b_proj`, whose keys and values are projected from a latent.
    - router: choices by `topk` of as many experts as the configuration says, among as many as it has, and calls of `sparsemixer`.
    - experts: outermost calls of a module named `...Experts` that are not the shared ones.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()
        self._model = model
        self._alive: list[Any] = []
        self._sums: dict[int, int] = {}  # id of a tensor -> id of the residual sum it is
        self._weights: dict[int, int] = {}  # id of a tensor -> id of the softmax whose output it is
        self._activations: dict[int, int] = {}  # id of an activation's output -> id of the value activated
        self._roots: dict[int, int] = {}  # id of a tensor -> id of the value it was computed from elementwise
        self._counted: set[int] = set()
        self._norms: list[_Norm] = []
        self._rotations = 0
        self._latent = self._experts = 0  # how deep in modules of these kinds
        self._expert_counts, self._chosen_counts = (_numbers(model, names) for names in (EXPERT_COUNTS, CHOSEN_COUNTS))
        self._activation_inputs: list[Tensor] = []
        self._stack = ExitStack()

    # -- set-up

    def __enter__(self) -> SiteCounter:
        self._stack.callback(register_module_forward_pre_hook(self._before_module).remove)
        self._stack.callback(register_module_forward_hook(self._after_module).remove)
        for owner, name in _functions(self._model, ROTATION):
            self._patch(owner, name, self._rotation)
        for owner, name in _functions(self._model, NORM_FUNCTION):
            self._patch(owner, name, self._norm_function)
        for owner, name in _functions(self._model, ROUTING_FUNCTION):
            self._patch(owner, name, self._routing_function)
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._stack.close()
        self._alive.clear()

    def _patch(self, owner: Any, name: str, observer: Callable[..., Any]) -> None:
        original = vars(owner)[name]
        function = original.__func__ if isinstance(original, staticmethod) else original

        @functools.wraps(function)
        def observed(*args: Any, **kwargs: Any) -> Any:
            return observer(function, *args, **kwargs)

        self._stack.enter_context(mock.patch.object(owner, name, staticmethod(observed) if function is not original else observed))

    # -- functions of the modeling file

    def _rotation(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rotations += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._rotations -= 1
        if not self._rotations:
            rotated = result if isinstance(result, (tuple, list)) else (result,)
            self.sites["rope"] += sum(isinstance(tensor, Tensor) for tensor in rotated)
        return result

    def _norm_function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._norms:  # inside a norm module it is the module that counts
            self.sites["l2_norm" if "l2" in function.__name__ else "rms_norm"] += 1
        return function(*args, **kwargs)

    def _routing_function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.sites["router"] += 1
        return function(*args, **kwargs)

    # -- modules

    def _before_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = type(module).__name__
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self._latent += hasattr(module, "kv_b_proj")
        if EXPERTS_MODULE.search(name):
            self.sites["experts"] += not self._experts
            self._experts += 1
        if "Norm" in name:
            self._norms.append(_Norm(module, tensors[0] if tensors else None, gated=len(tensors) > 1))
        elif ACTIVATION_MODULES.search(name) and tensors:
            self._activation_inputs.append(tensors[0])

    def _after_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._latent -= hasattr(module, "kv_b_proj")
        self._experts -= bool(EXPERTS_MODULE.search(type(module).__name__))
        if self._norms and self._norms[-1].module is module:
            self._end_norm(self._norms.pop())
        elif self._activation_inputs and args and self._activation_inputs[-1] is args[0] and isinstance(output, Tensor):
            self._activated(output, self._activation_inputs.pop())

    def _end_norm(self, norm: _Norm) -> None:
        if norm.done_by_torch or not norm.means:
            return
        if norm.means > 1:
            self.sites["layer_norm"] += 1
        else:
            self._rms_norm(norm.source, norm.gated)

    def _rms_norm(self, source: Tensor | None, gated: bool) -> None:
        self.sites["gated_rms_norm" if gated else "rms_norm"] += 1
        if gated:  # its input is an update, and a sum there a skip connection of the update's own
            return
        residual = self._sums.get(id(source))
        if residual is not None:
            self._count_once("residual_add", residual)

    def _count_once(self, idiom: str, key: int) -> None:
        if key not in self._counted:
            self._counted.add(key)
            self.sites[idiom] += 1

    # -- torch functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        tensors = [arg for arg in _flat(args) + list(kwargs.values()) if isinstance(arg, Tensor)]
        results = [item for item in _flat(result) if isinstance(item, Tensor)]
        self._alive += [*tensors, *results]
        if tensors and results:
            self._watch(name, tensors, results)
        return result

    def _watch(self, name: str, tensors: list[Tensor], results: list[Tensor]) -> None:
        first, result = tensors[0], results[0]
        if name == "mean" and self._norms:
            self._norms[-1].means += 1
        elif name in ("rms_norm", "layer_norm"):
            if self._norms:
                self._norms[-1].done_by_torch = True
            if name == "rms_norm":
                self._rms_norm(first, gated=False)
            else:
                self.sites["layer_norm"] += 1
        elif name == "normalize":
            self.sites["l2_norm"] += 1
        elif name == "scaled_dot_product_attention":
            self._attention(id(result))
        elif name == "topk":
            self._topk(first, result)
        elif name == "softmax":
            self._weights[id(result)] = id(result)
        elif name in MATMULS:
            for softmax in {self._weights[id(tensor)] for tensor in tensors if id(tensor) in self._weights}:
                self._attention(softmax)
        if name in SUMS and not self._rotations and len(tensors) == 2 and tensors[0].shape == tensors[1].shape and result.dim() > 1:
            self._sums[id(result)] = id(result)
        if name in ACTIVATIONS:
            self._activated(result, first)
        if name in PRODUCTS and len(tensors) == 2:
            self._product(tensors[0], tensors[1], result)
        self._follow(name, tensors, results)

    def _topk(self, values: Tensor, chosen: Tensor) -> None:
        many = {values.shape[-1], values.shape[-1] - 1}  # one more: the choice of no expert
        self.sites["router"] += bool(many & self._expert_counts) and chosen.shape[-1] in self._chosen_counts and values.dim() < 4

    def _attention(self, key: int) -> None:
        self._count_once("attention", key)
        if self._latent:
            self._count_once("mla_attention", -key)

    def _activated(self, result: Tensor, source: Tensor) -> None:
        self._alive.append(result)
        self._activations[id(result)] = self._roots.get(id(source), id(source))

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        for gate, value in ((left, right), (right, left)):
            activated = self._activations.get(id(gate))
            if activated is None or gate.shape != value.shape:
                continue
            if self._roots.get(id(value), id(value)) == activated:
                self._activations[id(result)] = activated  # x * sigmoid(a x) is itself an activation of x
            elif not self._inside_gated_norm():
                self.sites["glu"] += 1
            return

    def _inside_gated_norm(self) -> bool:
        return any(norm.gated for norm in self._norms)

    def _follow(self, name: str, tensors: list[Tensor], results: list[Tensor]) -> None:
        """Hands on what is known of the operands to the results."""
        source = id(tensors[0])
        for result in results:
            if result is tensors[0]:
                if name not in SAME_VALUE and name not in SUMS:  # written over in place: what it held is no sum any more
                    self._sums.pop(source, None)
                continue
            if name in SAME_VALUE:
                for known in (self._sums, self._activations):
                    if source in known:
                        known[id(result)] = known[source]
            if name in PART_OF_VALUE and source in self._weights:
                self._weights[id(result)] = self._weights[source]
            if name in SAME_VALUE or (name in ELEMENTWISE and len(tensors) == 1):
                self._roots[id(result)] = self._roots.get(source, source)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _numbers(model: nn.Module, names: Iterable[str]) -> set[int]:
    """The numbers that the configuration has under such names."""
    found = (getattr(getattr(model, "config", None), name, None) for name in names)
    return {number for number in found if isinstance(number, int)}


def _functions(model: nn.Module, pattern: re.Pattern[str]) -> list[tuple[Any, str]]:
    """Where the modeling files of a model hold functions of such a name: `(module or class, name)`."""
    files = {
        sys.modules[type(module).__module__] for module in model.modules() if type(module).__module__.startswith("transformers.models.")
    }
    owners: list[Any] = [*files, *{type(module) for module in model.modules()}]
    return [(owner, name) for owner in owners for name, value in vars(owner).items() if pattern.search(name) and _is_function(value)]


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, staticmethod)
