"""The canonical view: equal computations are one `Value`, whatever their spelling. It stands beside the FX graph and never changes it."""

from .build import View, build_view
from .value import Form, Literal, Value

__all__ = ["Form", "Literal", "Value", "View", "build_view"]
