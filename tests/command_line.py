"""The command line, called in process as its console script is."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from npu_fusion.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    """What `npu-fusion ARGUMENTS` exits with and prints."""
    monkeypatch.setattr(sys, "argv", ["npu-fusion", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    return Result(int(exit_.value.code or 0), out, err)
