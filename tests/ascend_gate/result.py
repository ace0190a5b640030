"""What the gate finds out about a case, as it travels from the ascend environment to the project's own. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = ("ttir", "linalg", "hivm", "link")
UNKNOWN = 0  # trip count of a loop whose length is known only at run time


@dataclass(frozen=True)
class Subject:
    """What of a case can be known without compiling it.

    Attributes:
        family: the case's module: "norm" for tests/kernels/cases/norm.py.
        name: the case's name, unique in its family.
        kernel: the kernel's qualified name, "npu_fusion.kernels.norm.rms_norm_kernel".
        grid: number of programs that are launched.
        loops, note: what the case accepts (case.py).
    """

    family: str
    name: str
    kernel: str
    grid: int
    loops: tuple[int, ...] = ()
    note: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subject:
        return cls(**{**data, "loops": tuple(data["loops"])})

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


@dataclass(frozen=True)
class Stage:
    """One step of the compilation: its wall time in seconds, and the error it ended with ("": it succeeded)."""

    seconds: float
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Overflow:
    """A memory that is too small: its name, and what the kernel needs and the core has, in bytes."""

    memory: str
    needed: int
    available: int


@dataclass(frozen=True)
class ScalarLoop:
    """A loop of the final module that handles single elements.

    Attributes:
        trips: how often its body runs, by the loops of constant length around it; UNKNOWN where its own is not constant.
        accesses: what the body does to single elements, such as "load i64 ub" or "transfer f32 gm".
        rows: whether each pass works on a whole row (at least one vector), and single elements are only read, as its index or factor,
            or sent to global memory, as its sum. Such a loop costs little.
    """

    trips: int
    accesses: tuple[str, ...]
    rows: bool = False

    def __str__(self) -> str:
        return f"{self.trips or 'unknown'} {'rows' if self.rows else 'elements'} ({', '.join(self.accesses)})"


@dataclass(frozen=True)
class Result:
    """One case, compiled for one SoC.

    Attributes:
        stages: the stages that ran, in order; the first that fails is the last.
        memory: peak use of each on-chip memory in bytes: "ub" (unified buffer), "cbuf" (L1), "cc" (L0C), ...
        overflow: the memory that was too small.
        scalar_loops: loops over single elements, most trips first.
        warnings: what the compiler noted.
        lost_double_buffering: why transfers do not overlap with computation as they should; "" where they do.
    """

    subject: Subject
    soc: str
    stages: Mapping[str, Stage] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    overflow: Overflow | None = None
    scalar_loops: tuple[ScalarLoop, ...] = ()
    warnings: tuple[str, ...] = ()
    lost_double_buffering: str = ""

    @property
    def ok(self) -> bool:
        """Whether the case went through all stages."""
        return tuple(self.stages) == STAGES and all(stage.ok for stage in self.stages.values())

    @property
    def ub(self) -> int:
        """Peak use of the unified buffer in bytes."""
        return self.memory.get("ub", 0)

    @classmethod
    def of_death(cls, subject: Subject, soc: str, how: str) -> Result:
        """What is known of a case whose process died."""
        return cls(subject, soc, {STAGES[0]: Stage(0.0, how)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The result that `dataclasses.asdict` turned into plain data."""
        return cls(
            subject=Subject.from_json(data["subject"]),
            soc=data["soc"],
            stages={name: Stage(**stage) for name, stage in data["stages"].items()},
            memory=data["memory"],
            overflow=Overflow(**data["overflow"]) if data["overflow"] else None,
            scalar_loops=tuple(ScalarLoop(**{**loop, "accesses": tuple(loop["accesses"])}) for loop in data["scalar_loops"]),
            warnings=tuple(data["warnings"]),
            lost_double_buffering=data["lost_double_buffering"],
        )
