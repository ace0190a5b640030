"""`python -m npu_fusion.lowerings.ascend FILE` writes the table of Ascend ops to FILE."""

from __future__ import annotations

import argparse
from pathlib import Path

from .describe import op_table_markdown


def main(arguments: list[str] | None = None) -> None:
    """Write `op_table_markdown()` to the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m npu_fusion.lowerings.ascend", description="Write the table of Ascend ops as Markdown.")
    parser.add_argument("file", type=Path, help="the Markdown file to write, e.g. docs/op-table.md")
    parser.parse_args(arguments).file.write_text(op_table_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
