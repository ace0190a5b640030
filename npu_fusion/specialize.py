"""Floats that configure a model, as constants.

With `dynamic=True` Dynamo passes every Python float as an input, the eps of a norm and `math.pi` among them: one graph then serves
values that in practice never change, and a captured graph would freeze them in silence. A float that belongs to a module, to a global or
to a closure is made a constant of the graph again, under a guard: another value compiles another graph. A float that the caller passes as
an argument stays an input (rules capture it unread, see `pattern.lit`).
"""

from __future__ import annotations

from torch.fx import GraphModule

from .torch_private import is_configuration


def specialize_floats(gm: GraphModule) -> int:
    """Guard the floats of a Dynamo graph that configure the model on their values, which makes Dynamo or AOT trace them as constants.

    Returns how many there were.
    """
    count = 0
    for node in gm.graph.nodes:
        if node.op != "placeholder" or not is_configuration(node.meta.get("grapharg")):
            continue
        for user in node.users:
            if user.op == "call_method" and user.target == "item":
                float(user.meta["example_value"])
                count += 1
    return count
