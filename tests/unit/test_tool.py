"""Tests of what the tools have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.tool import check_output, run_tool


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--json .* is a directory"):
        check_output("--json", tmp_path)
    with pytest.raises(UserError, match="--json .* cannot be written"):
        check_output("--json", tmp_path / "file" / "x.json")


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("")
    (tmp_path / "link.json").symlink_to("data.json")
    for name in ("data.json", "link.json", "x/../data.json"):
        with pytest.raises(UserError, match=f"--json .*{name} is what this command reads; give another file"):
            check_output("--json", tmp_path / name, [tmp_path / "model", tmp_path / "data.json"])
    check_output("--json", tmp_path / "other.json", [tmp_path / "data.json"])


def test_directories_are_made_and_nothing_else(tmp_path: Path) -> None:
    check_output("--json", None)
    check_output("--json", tmp_path / "new" / "x.json")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("no"), 2, "error: no"),
        (MegatronPruneError("broken"), 1, "error: broken"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_tool_ends_with_one_line(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> None:
        raise raised

    assert run_tool(action) == code
    assert capsys.readouterr().err == f"{line}\n"
    assert run_tool(lambda: None) == 0
    assert run_tool(lambda: 1) == 1
