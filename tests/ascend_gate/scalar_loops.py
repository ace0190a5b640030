"""Finds the loops over single elements in the module that bishengir-compile would hand to hivmc.

Ascend's cores work on vectors. Where the compiler has no vector instruction for an operation it leaves a loop that loads, computes and
stores one element at a time, which is correct and slower by orders of magnitude. The module is read as text, a line an operation, as the
compiler prints it:

    scf.for %i = %c0 to %c256 step %c1 {
      %0 = memref.load %buffer[%i] : memref<256xi64, #hivm.address_space<ub>>

What counts as an access to a single element: a load or store in global memory; a load or store at an index that varies, in the unified
buffer (a fixed one is where a reduction leaves its result); a transfer of one element by a library function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .result import UNKNOWN, ScalarLoop

VECTOR_BYTES = 256  # what one vector instruction works on
_BYTES = {"i1": 1 / 8, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8, "index": 8}

_CONSTANT = re.compile(r"(%\S+) = arith\.constant (-?\d+) : (?:index|i\d+)$")
_FOR = re.compile(r"scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)")
_ACCESS = re.compile(r"memref\.(load|store) [^\[]*\[([^\]]*)\].*: (memref<.*>)$")
_RESULT = re.compile(r"(%\S+) = \S.*?(%[\w#]+).*(memref<.*>)$")
_CALL = re.compile(r"\bcall @\w+\(([^)]*)\) : \((.*)\) -> ")
_MEMREF = re.compile(r"memref<((?:[\d?]+x)*)(\w+)")


@dataclass
class _Loop:
    """A loop that is being read."""

    trips: int  # its own
    outer: _Loop | None
    accesses: set[str] = field(default_factory=set)
    vector: bool = False  # whether a pass works on at least one vector, here or in a loop inside

    def around(self) -> Iterator[_Loop]:
        """This loop and those it lies in, from the inside."""
        loop: _Loop | None = self
        while loop:
            yield loop
            loop = loop.outer

    def finished(self) -> ScalarLoop:
        trips = self.trips * math.prod(loop.trips for loop in self.around() if loop is not self and loop.trips != UNKNOWN)
        elementwise = any(access.startswith("store") for access in self.accesses)  # whatever vectors it works on as well
        return ScalarLoop(trips, tuple(sorted(self.accesses)), rows=self.vector and not elementwise)


@dataclass(frozen=True)
class _Memref:
    """A memref type: number of elements (None: known at run time), element type, and whether it is in global memory."""

    elements: int | None
    dtype: str
    is_global: bool

    @classmethod
    def parse(cls, text: str) -> _Memref:
        match = _MEMREF.match(text)
        if not match:
            raise ValueError(f"not a memref: {text}")
        sizes = match[1].split("x")[:-1]
        return cls(None if "?" in sizes else math.prod(map(int, sizes)), match[2], "address_space<gm>" in text)

    @property
    def bytes(self) -> float:
        return (self.elements or 0) * _BYTES.get(self.dtype, 1)


def scalar_loops(module: str) -> tuple[ScalarLoop, ...]:
    """The loops of a module that access single elements, most trips first; a loop of one trip is none.

    A loop over rows whose length is unknown is left out: every kernel's outermost loop is one, and may load a scalar a row.
    """
    reader = _Reader()
    for line in module.splitlines():
        reader.read(line.strip())
    found = [loop.finished() for loop in reader.loops if loop.accesses]
    kept = {loop for loop in found if loop.trips != 1 and not (loop.rows and loop.trips == UNKNOWN)}
    return tuple(sorted(kept, key=lambda loop: (-loop.trips, loop.accesses, loop.rows)))


class _Reader:
    def __init__(self) -> None:
        self.loops: list[_Loop] = []
        self.regions: list[_Loop | None] = []  # of the open braces, each with the innermost loop that it is in
        self.constants: dict[str, int] = {}
        self.memrefs: dict[str, _Memref] = {}

    @property
    def loop(self) -> _Loop | None:
        return self.regions[-1] if self.regions else None

    def read(self, line: str) -> None:
        if line.startswith("func.func"):  # names of values are a function's own
            self.constants, self.memrefs = {}, {}
        closed = self.regions.pop() if line.startswith("}") and self.regions else None
        if line.endswith("{"):
            self.regions.append(closed if line.startswith("} do") else self._opened(line))
        elif constant := _CONSTANT.match(line):
            self.constants[constant[1]] = int(constant[2])
        elif access := _ACCESS.search(line):
            self._access(access[1], access[2], _Memref.parse(access[3]))
        elif call := _CALL.search(line):
            self._call([operand.strip() for operand in call[1].split(",")])
        elif result := _RESULT.match(line):
            self._result(line, result[1], result[2], result[3])

    def _opened(self, line: str) -> _Loop | None:
        """The loop that a region lies in which this line opens: a new one for a loop's own body."""
        if bounds := _FOR.search(line):
            trips = self._trips(*(self.constants.get(bounds[group]) for group in (1, 2, 3)))
        elif "scf.while" in line:
            trips = UNKNOWN
        else:
            return self.loop
        self.loops.append(_Loop(trips, self.loop))
        return self.loops[-1]

    @staticmethod
    def _trips(low: int | None, high: int | None, step: int | None) -> int:
        if low is None or high is None or not step:
            return UNKNOWN
        return max(1, math.ceil((high - low) / step))  # a loop that never runs costs no more than one that runs once

    def _access(self, op: str, indices: str, memref: _Memref) -> None:
        varies = any(index.strip() not in self.constants for index in indices.split(",") if index.strip())
        if self.loop and (memref.is_global or varies):
            self.loop.accesses.add(f"{op} {memref.dtype} {'gm' if memref.is_global else 'ub'}")

    def _call(self, operands: list[str]) -> None:
        """A library function: its operands were cast to memrefs of any size just before."""
        memrefs = [self.memrefs[operand] for operand in operands if operand in self.memrefs]
        if not self.loop or not memrefs:
            return
        if max(memref.bytes for memref in memrefs) >= VECTOR_BYTES:
            for loop in self.loop.around():
                loop.vector = True
        if all((memref.elements or 0) <= 1 for memref in memrefs) and any(memref.is_global for memref in memrefs):
            self.loop.accesses.add(f"transfer {memrefs[0].dtype} gm")

    def _result(self, line: str, name: str, source: str, last_type: str) -> None:
        """Remember how large a memref is at most: by its type, by the type that it is a view of, or by that view."""
        types = [_Memref.parse("memref<" + text) for text in line.split("memref<")[1:]]
        target = types[-1]
        known = [memref for memref in (self.memrefs.get(source), *types) if memref is not None and memref.elements is not None]
        self.memrefs[name] = known[-1] if known else target
