"""Tests of what the tools have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.tool import beside, check_output, check_output_directory, files_of, run_tool, written_at_once


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--json .* is a directory"):
        check_output("--json", tmp_path)
    with pytest.raises(UserError, match="--json .* cannot be written"):
        check_output("--json", tmp_path / "file" / "x.json")
    with pytest.raises(UserError, match="--save .* is a file"):
        check_output_directory("--save", tmp_path / "file")
    with pytest.raises(UserError, match="--save .* cannot be written"):
        check_output_directory("--save", tmp_path / "file" / "export")


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
    check_output_directory("--save", tmp_path / "new" / "export")
    assert not list((tmp_path / "new").iterdir())


def test_where_a_result_goes_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.1B").mkdir()
    monkeypatch.chdir(tmp_path / "1.1B")
    assert beside(Path("runs/export"), ".onnx") == Path("runs/export.onnx")
    assert beside(Path("."), "-int8") == tmp_path / "1.1B-int8"
    assert beside(Path("../1.1B/.."), "-int8") == tmp_path.with_name(f"{tmp_path.name}-int8")


def test_an_output_is_there_at_once_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()

    def write(fails: bool) -> None:
        with written_at_once(target) as scratch:
            (scratch / "model").mkdir()
            (scratch / "model" / "new").touch()
            (scratch / "model.data").touch()
            assert not fails

    with pytest.raises(AssertionError):
        write(fails=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    write(fails=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "model.data", "new"]


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


def test_files_of_a_run_are_those_of_its_exports_too(tmp_path: Path) -> None:
    weights = tmp_path / "exports" / "step_00000004" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    for file in (weights, tmp_path / "ledger.jsonl", tmp_path / "run.html"):
        file.touch()
    assert sorted(files_of(tmp_path)) == [weights, tmp_path / "ledger.jsonl"]
