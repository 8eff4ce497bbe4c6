"""What docs/cluster.md shows of the planner is what the planner prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

COMMAND = "python tools/plan.py"


def _quoted(page: Path) -> list[tuple[str, str]]:
    """Every planner command of a page with the text of the fenced block after it."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(command, output) for command, output in zip(blocks, [*blocks[1:], ""], strict=True) if COMMAND in command]


def test_page_quotes_what_the_planner_prints(repo_root: Path) -> None:
    quoted = _quoted(repo_root / "docs" / "cluster.md")
    assert len(quoted) >= 5
    for command, output in quoted:
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:2] == COMMAND.split(), f"one command a block: {command}"
        ran = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, timeout=60, cwd=repo_root, check=False
        )
        assert ran.returncode == 0, f"{command}: {ran.stderr}"
        assert ran.stdout == output, f"{command}: the page is out of date"


def test_every_mention_is_a_block_of_its_own(repo_root: Path) -> None:
    page = repo_root / "docs" / "cluster.md"
    assert page.read_text(encoding="utf-8").count(COMMAND) == len(_quoted(page))
