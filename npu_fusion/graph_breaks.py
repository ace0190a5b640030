"""Why and where Dynamo cut a function into several graphs, in one line a cut."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch.fx import GraphModule

from .torch_private import counters

# How Dynamo names the instruction at which it had to stop, where it gives no reason in words.
_INSTRUCTIONS = {
    "generic_jump": "Data-dependent branching",
    "step_unsupported": "Unsupported instruction",
    "store_attr": "Attribute written",
}
_EXPLANATION = re.compile(r"^\s*Explanation:\s*(.+)$", re.MULTILINE)


def break_reason(gm: GraphModule) -> str | None:
    """Why Dynamo ended this graph before the function did, e.g. `Data-dependent branching, at model.py:27`; None where it did not.

    Args:
        gm: the graph as Dynamo hands it to a backend.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = describe(reason.reason)
    place = _innermost(reason.user_stack)
    return f"{text}, at {place}" if place else text


def break_counts() -> Counter[str]:
    """Dynamo's count of graph breaks by reason in this process, as it stands; also of those that left no graph behind."""
    return Counter(counters["graph_break"])


def title_of(reason: str) -> str:
    """What Dynamo calls the cause of a break, without explanation, hints and web address."""
    title = reason.strip().split("\n", 1)[0].strip()
    return _INSTRUCTIONS.get(title.split(" ", 1)[0], title)


def describe(reason: str) -> str:
    """Dynamo's reason as one line: its title, and the explanation in brackets."""
    explanation = _EXPLANATION.search(reason)
    title = title_of(reason)
    return f"{title} ({explanation.group(1).strip().rstrip('.')})" if explanation else title


def _innermost(stack: Any) -> str | None:
    frames = list(stack or ())
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
