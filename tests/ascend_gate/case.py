"""What the gate compiles: one kernel with the constants of one launch. Importable with and without torch, and with any Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_fusion.kernels.launch import Launch


@dataclass(frozen=True)
class Case:
    """A launch whose kernel must compile for Ascend.

    A file `tests/kernels/cases/<family>.py` has `def cases() -> Iterator[Case]`, which makes launches by the family's own plan functions.

    Attributes:
        name: unique within the family, such as "rms_norm 4096 bf16".
        launch: the kernel, its grid, constants and options on an Ascend device.
        types: the type of each argument that is no constant: "*bf16", "*fp16", "*fp32", "*i8", "*i32", "i32", "fp32", ...; None for a
            tensor that is left out, as Triton compiles None in.
        loops: trip counts of the scalar loops that are accepted; 0 stands for one that is known only at run time.
        note: why they are, or why double buffering is given up.
    """

    name: str
    launch: Launch
    types: Mapping[str, str | None]
    loops: tuple[int, ...] = ()
    note: str = ""
