"""What the benchmarks of kernels measure is the same computation, ours and in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_subjects import SUBJECTS, Subject, tensors_in
from benchmarks.kernels import agrees, bytes_of


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_plain_and_ours_agree(subject: Subject) -> None:
    assert agrees(subject, subject.inputs(3, "cuda" if torch.cuda.is_available() else "cpu"), cores=4)


def test_names_are_unique() -> None:
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)


def test_bytes_are_those_of_all_tensors() -> None:
    values = (torch.zeros(3, 4), [torch.zeros(2, dtype=torch.int8), 7], None)
    assert len(tensors_in(values)) == 2
    assert bytes_of(values) == 3 * 4 * 4 + 2
