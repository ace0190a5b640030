"""Why and where Dynamo cut a function into several graphs, in one line a cut."""

from __future__ import annotations

import re
from collections import Counter
from linecache import getlines
from pathlib import PurePath

from torch.fx import GraphModule

from .torch_private import counters

# How Dynamo names the instruction at which it had to stop, where it gives no reason in words.
_INSTRUCTIONS = {
    "generic_jump": "Data-dependent branching",
    "step_unsupported": "Unsupported instruction",
    "store_attr": "Attribute written",
}
# Breaks for a size or a branch that depends on numbers, as of experts that look up which tokens are theirs.
_BY_DATA = re.compile(r"Dynamic shape operator|Data-dependent|\.item\(\)|tolist|nonzero", re.IGNORECASE)
_OF_TRANSFORMERS = 'model.set_experts_implementation("grouped_mm") makes it one graph'
_OF_OTHERS = "experts by torch.histc and torch.nn.functional.grouped_mm, or by gathered matrices (weight[ids]), make it one graph"
_EXPLANATION = re.compile(r"^\s*Explanation:\s*(.+)$", re.MULTILINE)


def break_reason(gm: GraphModule) -> str | None:
    """Why Dynamo ended this graph before the function did, e.g. `Data-dependent branching, at model.py:27`; None where it did not.

    Where experts look up their tokens, the way to do without follows.

    Args:
        gm: the graph as Dynamo hands it to a backend.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = describe(reason.reason)
    frames = list(reason.user_stack or ())
    if not frames:
        return text
    frame = frames[-1]
    advice = _advice(text, frame.filename, frame.line or "")
    return f"{text}, at {frame.filename}:{frame.lineno}" + (f"; {advice}" if advice else "")


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


def _advice(reason: str, filename: str, line: str) -> str | None:
    """How to do without a break at this line of code: for experts that are looked up by numbers. None where there is nothing to say."""
    if not _BY_DATA.search(reason) or "expert" not in line.lower():
        return None
    return _OF_TRANSFORMERS if _has_implementations(filename) else _OF_OTHERS


def _has_implementations(filename: str) -> bool:
    """Whether the experts of a file of transformers can be switched to another implementation: not those of every architecture can."""
    return "transformers" in PurePath(filename).parts and any("use_experts_implementation" in line for line in getlines(filename))
