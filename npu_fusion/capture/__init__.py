"""Capture: record the kernel launches of a lowered graph once, replay them with a single launch.

Works with the graph API that `torch.cuda` and `torch.npu` share.

- `check.py` says before a capture what of a graph cannot be captured, and where in the author's code that comes from;
- `inputs.py` says what a capture depends on: one is kept for each combination of sizes, and of addresses that the graph may not copy;
- `host_lists.py` finds the lists of lengths that a kernel launch reads on the host. A replay with other lengths updates the launches
  that take them (`task_groups.py`) in place of capturing anew;
- `device.py` is the device: its streams, and the one pool of memory that all captures share;
- `replay.py` puts it together;
- `facts.py` is what a library of ops has to tell of them beyond their schemas.
"""

from .check import Obstacle, find_obstacles
from .facts import CaptureFacts, register_capture_facts
from .replay import capture

__all__ = ["CaptureFacts", "Obstacle", "capture", "find_obstacles", "register_capture_facts"]
