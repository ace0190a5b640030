"""What a library of ops knows of them that capture needs and schemas do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CaptureFacts:
    """Facts about ops, asked by FX call target; both functions know nothing of targets of other libraries.

    Attributes:
        host_lists: names of the int lists among an op's arguments that its launch reads on the host. A capture freezes them.
        hazard: why a capture cannot hold an op, in words that follow its name ("allocates its workspace when first called"), or None.
    """

    host_lists: Callable[[Any], tuple[str, ...]]
    hazard: Callable[[Any], str | None]


_REGISTERED: list[CaptureFacts] = []


def register_capture_facts(facts: CaptureFacts) -> None:
    """Make facts known to capture; what lowerings/ do when they are imported."""
    _REGISTERED.append(facts)


def host_lists_of(target: Any) -> tuple[str, ...]:
    """The host lists among the arguments of a call target, as all registered facts have it."""
    return tuple(dict.fromkeys(name for facts in _REGISTERED for name in facts.host_lists(target)))


def hazard_of(target: Any) -> str | None:
    """Why a capture cannot hold a call target, or None."""
    return next((reason for facts in _REGISTERED if (reason := facts.hazard(target)) is not None), None)
