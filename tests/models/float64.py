"""Running a model in float64 throughout: the reference of the numeric contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

_LOWER = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _grouped_mm(rows: Tensor, weights: Tensor, *, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`grouped_mm`, which torch has not for float64: rows up to `offs[g]` times the matrix of group `g`; rows after the last are zero."""
    assert bias is None, "transformers adds the bias itself"
    assert out_dtype in (None, torch.float64)
    result = rows.new_zeros(rows.shape[0], weights.shape[-1])
    ends = offs.tolist()
    for group, (start, end) in enumerate(zip([0, *ends], ends)):
        result[start:end] = rows[start:end] @ weights[group]
    return result


_REPLACED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("float", "half", "bfloat16"), Tensor.double),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped_mm),
}


class Float64Mode(TorchFunctionMode):
    """Turns every request for a narrower floating dtype into one for float64.

    A model made double by `module.double()` still computes its norms, softmaxes and rotary tables in float32, where its code says so.
    """

    def __enter__(self) -> Float64Mode:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _widen(args), _widen(kwargs or {})
        func = _REPLACED.get(getattr(func, "__name__", ""), func)
        result = func(*args, **kwargs)
        # What comes out narrow all the same (a factory function with the default dtype) is widened here.
        return result.double() if isinstance(result, Tensor) and result.dtype in _LOWER else result


def _widen(value: Any) -> Any:
    """`value` with every narrower floating dtype in it replaced by float64; tensors stay what they are."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOWER else value
    if type(value) in (tuple, list):
        return type(value)(_widen(item) for item in value)
    if type(value) is dict:
        return {name: _widen(item) for name, item in value.items()}
    return value


def to_float64(value: T) -> T:
    """Makes every floating tensor reachable from a module, cache, list or dict float64, in place where it can be; returns it."""
    converted: T = _convert(value, {})
    return converted


def _convert(value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, nn.Module):
        seen[id(value)] = value
        for module in value.double().modules():
            _convert_attributes(module, seen)
        return value
    if isinstance(value, Tensor):
        converted: Any = value.double() if value.dtype in _LOWER else value
    elif isinstance(value, torch.dtype):
        return _widen(value)
    elif type(value) in (tuple, list):
        converted = type(value)(_convert(item, seen) for item in value)
    elif type(value) is dict:
        converted = {name: _convert(item, seen) for name, item in value.items()}
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        seen[id(value)] = value
        _convert_attributes(value, seen)
        return value
    else:
        return value
    seen[id(value)] = converted
    return converted


def _convert_attributes(holder: Any, seen: dict[int, Any]) -> None:
    """Converts the plain attributes of an object (a module's parameters, buffers and children are left to `Module.double`)."""
    for name, attribute in list(vars(holder).items()):
        if name not in ("_parameters", "_buffers", "_modules"):
            vars(holder)[name] = _convert(attribute, seen)
