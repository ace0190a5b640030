"""What the table of Ascend ops has to tell capture: which arguments are host lists, and which ops a capture cannot hold."""

from __future__ import annotations

from typing import Any

from ...capture import CaptureFacts, register_capture_facts
from .table import find_op, host_lists


def hazard(target: Any) -> str | None:
    """Why a capture cannot hold an op of the table, or None."""
    op = find_op(target)
    return None if op is None or op.capturable else op.capture


register_capture_facts(CaptureFacts(host_lists, hazard))
