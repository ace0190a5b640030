"""Cases of the self test: an op, and a recipe for arguments that are the same on every machine.

    def _rms_norm(inputs: Inputs, dtype: torch.dtype, shape: Shape) -> Arguments:
        return {"input": inputs.normal(shape, dtype), "gamma": inputs.near_one(shape[-1:], dtype)}

    case("npu::npu_rms_norm", _rms_norm, BF16, (2, 16, 4096))       # is shown as `bf16 [2, 16, 4096]`

Shapes are small, so that all cases take about a minute, but as aligned as real ones: a device has limits that a CPU does not have.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..describe import short_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = (BF16, FP16)
FLOATS = (BF16, FP16, FP32)

Shape = Sequence[int]
Arguments = Mapping[str, Any]
"""Arguments of an op by the names of its schema; those not given have their defaults."""


class Inputs:
    """Random tensors on the CPU, reproducible for each seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Shape, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * scale).to(dtype)

    def near_one(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The weights of a norm."""
        return (1 + 0.1 * torch.randn(*shape, generator=self._generator)).to(dtype)

    def angles(self, shape: Shape, dtype: torch.dtype, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """Cosines and sines of random angles, each written twice: as two equal halves, or next to each other."""
        half = torch.rand(*shape[:-1], shape[-1] // 2, generator=self._generator) * 6.2
        angles = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat([half, half], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def places(self, count: int, limit: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Distinct indices below a limit, in random order."""
        return torch.randperm(limit, generator=self._generator)[:count].to(dtype)

    def integers(self, shape: Shape, limit: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(limit, tuple(shape), generator=self._generator).to(dtype)

    def flags(self, shape: Shape) -> Tensor:
        """True with a probability of a third."""
        return torch.rand(*shape, generator=self._generator) < 1 / 3


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: qualified name in the table.
        label: dtypes, shapes and modes, for people.
        make: the recipe.
        meaningless: results that say nothing in such a call.
        alone: whether a device runs it in a process by itself, which collectives of two and more ranks it does not.
    """

    op: str
    label: str
    make: Callable[[Inputs], Arguments]
    meaningless: tuple[str, ...] = ()
    alone: bool = True

    def arguments(self) -> dict[str, Any]:
        """The arguments, made anew: equal at every call, and nobody else's to mutate."""
        return dict(self.make(Inputs(zlib.crc32(f"{self.op} {self.label}".encode()))))

    def __str__(self) -> str:
        return f"{self.op.replace('::', '.')} {self.label}"


def case(op: str, make: Callable[..., Arguments], *parameters: Any, alone: bool = True, **named: Any) -> Case:
    """A case whose arguments are `make(inputs, *parameters, **named)`, and whose label lists the parameters."""
    label = " ".join([*(_shown(value) for value in parameters), *(f"{name}={_shown(value)}" for name, value in named.items())])
    return Case(op, label, lambda inputs: make(inputs, *parameters, **named), alone=alone)


def _shown(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return short_dtype(str(value).removeprefix("torch."))
    return str(list(value)) if isinstance(value, tuple) else str(value)
