"""torchair as a backend whose users get our fusion by a hook. Its backend cannot be made in a process that has loaded npugraph_ex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fusion
from npu_fusion.lowerings.ascend.graph_compilers import load_compiler, torchair_config
from tests.blocks import Block
from tests.virtual_npu.launches import Trace

pytestmark = pytest.mark.npu_process("torchair")


def test_users_keep_their_backend_and_their_pass(traced: Callable[[], Trace]) -> None:
    seen: list[int] = []

    def mine(gm: Any, inputs: Any, config: Any) -> None:
        seen.append(len(gm.graph.nodes))

    torchair = load_compiler("torchair")
    base = torchair.CompilerConfig()
    base.mode, base.post_grad_custom_pre_pass = "reduce-overhead", mine
    backend = torchair.get_npu_backend(compiler_config=torchair_config(base=base))
    run = torch.compile(Block(64).half().eval().npu(), backend=backend, dynamic=False)
    with torch.no_grad():
        for _ in range(3):
            run(torch.zeros(2, 8, 64, dtype=torch.float16).npu())
    [captured] = traced().captured
    assert captured.replays == 3
    assert captured.launches["aclnnRmsNorm"] == 1
    assert len(seen) == 1
    report = npu_fusion.report(run)
    assert report.effective_config.executor == "torchair"
    report.expect(rms_norm=1, glu=1)
