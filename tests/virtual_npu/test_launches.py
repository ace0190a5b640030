"""What is read out of a trace."""

from __future__ import annotations

from pathlib import Path

from .launches import parse, read, table

TRACE = """\
launch aclnnAdd
capture_begin graph=1
capture_end graph=1
capture_begin graph=2
launch aclnnMm
copy kind=3 bytes=64
task_group_begin graph=2
launch aclnnAttention
task_group_end graph=2 group=1
launch aclnnMm
capture_end graph=2
copy kind=1 bytes=8
update_begin group=1
launch aclnnAttention
update_end group=1
replay graph=2
replay graph=2
"""


def test_launches_belong_to_the_graph_under_capture() -> None:
    trace = parse(TRACE.splitlines())
    assert trace.last_graph == {"aclnnMm": 2, "aclnnAttention": 1}
    assert trace.total == {"aclnnAdd": 1, "aclnnMm": 2, "aclnnAttention": 2}
    [graph] = trace.captured  # the first one is empty
    assert (graph.copies, graph.task_groups, graph.updates, graph.replays) == (1, 1, 1, 2)


def test_updates_are_no_launches_of_the_graph() -> None:
    trace = parse(TRACE.splitlines())
    assert trace.updating == {"aclnnAttention": 1}
    assert trace.captured[0].launches["aclnnAttention"] == 1


def test_a_trace_without_captures_has_an_empty_graph(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("launch aclnnAdd\n")
    assert read(path).last_graph == {}
    assert read(path).captured == []


def test_table_lists_kernels_and_graphs() -> None:
    text = table(parse(TRACE.splitlines()))
    assert "     2  aclnnMm" in text
    assert "     3  in this graph" in text
    assert "graph 1: 3 launches, 1 copies, 1 task groups, 1 updates, 2 replays" in text
