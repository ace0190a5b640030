"""`python -m npu_fusion.ops FILE` writes the table of semantic ops to FILE."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import render_op_table


def main(arguments: list[str] | None = None) -> None:
    """Write `render_op_table()` to the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m npu_fusion.ops", description="Write the table of semantic ops as Markdown.")
    parser.add_argument("file", type=Path, help="the Markdown file to write, e.g. docs/ops.md")
    parser.parse_args(arguments).file.write_text(render_op_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
