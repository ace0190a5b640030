"""What the benchmarks of kernels measure is the same computation, ours and in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.kernel_subjects import SUBJECTS, Subject, tensors_in
from benchmarks.kernels import agrees, bytes_of

NARROWEST = {subject.name.split()[0]: subject for subject in reversed(SUBJECTS)}  # of a kernel: the interpreter takes its time


@pytest.mark.parametrize("subject", NARROWEST.values(), ids=NARROWEST)
def test_plain_and_ours_agree(subject: Subject) -> None:
    assert agrees(subject, subject.inputs(2, "cuda" if torch.cuda.is_available() else "cpu"), cores=4)


@pytest.mark.parametrize("name", ["rms_norm", "dynamic_quantize", "w4a16"])
def test_what_is_wrong_does_not_agree(name: str) -> None:
    subject = NARROWEST[name]

    def wrong(*inputs: Any, cores: int) -> Any:
        first, *others = tensors_in(subject.ours(*inputs, cores=cores))
        return first + 2 * (torch.arange(first.numel(), device=first.device).view_as(first) % 2 == 0).to(first.dtype), *others

    assert not agrees(dataclasses.replace(subject, ours=wrong), subject.inputs(2, "cuda" if torch.cuda.is_available() else "cpu"), cores=4)


def test_names_are_unique() -> None:
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)


def test_bytes_are_those_of_all_tensors() -> None:
    values = (torch.zeros(3, 4), [torch.zeros(2, dtype=torch.int8), 7], None)
    assert len(tensors_in(values)) == 2
    assert bytes_of(values) == 3 * 4 * 4 + 2
