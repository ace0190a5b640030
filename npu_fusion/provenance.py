"""Where a graph node comes from in the author's code: source line and module path."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

# What a node in place of others inherits from one of them.
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "from_node", "torch_fn")

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_TORCH_ROOT = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_SELF = re.compile(r"""^(?:L|G)\[['"]\w+['"]\]\.?""")
_FLAT_SELF = re.compile(r"^(?:L__self___|L_self_)")
_REGISTRY = re.compile(r"""\._modules\[['"](\w+)['"]\]|\.__dict__\[['"](\w+)['"]\]|\[['"]?(\w+)['"]?\]""")
_CALL_COUNT = re.compile(r"@\d+$")


def source_of(node: Node | None) -> str | None:
    """The innermost frame of the author's own code that produced `node`, as `file.py:line`; None where the node has no stack trace.

    Frames inside torch are passed over, unless there are no others (`torch.nn.RMSNorm` called by a compiled `torch.nn.Sequential`).
    """
    trace = node.meta.get("stack_trace") if node is not None else None
    return _innermost(trace) if trace else None


def module_of(node: Node | None) -> str | None:
    """The path of the innermost nn.Module that produced `node`, e.g. `model.layers.0.input_layernorm`; None outside any named module.

    Dynamo writes paths as guard sources (`L['self'].model.layers.0`, `L['self']._modules['model']`), export as plain paths.
    """
    stack: dict[str, tuple[Any, ...]] | None = node.meta.get("nn_module_stack") if node is not None else None
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    return _clean(path) or None


@lru_cache(maxsize=4096)
def _innermost(trace: str) -> str | None:
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(trace)]
    own = [frame for frame in frames if not frame[0].startswith(_TORCH_ROOT)]
    if not frames:
        return None
    file, line = (own or frames)[-1]
    return f"{file}:{line}"


@lru_cache(maxsize=4096)
def _clean(path: str) -> str:
    path = _CALL_COUNT.sub("", path)
    path = _FLAT_SELF.sub("", _SELF.sub("", path))
    path = _REGISTRY.sub(lambda match: "." + next(group for group in match.groups() if group is not None), path)
    return path.removeprefix("_orig_mod.").strip(".")
