"""Whatever a user's files hold, a run is planned or ends with one line and exit code 2, and takes no memory for it."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_prune.config.yaml_file import settings as flag_names
from megatron_prune.pretrain import main

EXAMPLES = 60  # of each of six kinds of input
MOST_KILOBYTES = 200 << 10  # that any input may take; the tiny model has 100
#: Values that a field of a file may turn out to have.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), "", "x", "-1", "1e9", [], {}, [[]]]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 10**12), max_size=3),
)
#: Ways to spoil bytes: where (a share of the file), how, with what.
SPOILS = st.tuples(
    st.sampled_from(["set", "cut", "insert", "all"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)
)

fuzzed = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spoil(content: bytes, how: tuple[str, float, bytes]) -> bytes:
    """Overwrite, cut off, insert or replace bytes."""
    kind, share, bytes_ = how
    place = int(share * len(content))
    if kind == "cut":
        return content[:place]
    if kind == "all":
        return bytes_
    return content[:place] + bytes_ + content[place + len(bytes_) * (kind == "set") :]


def run(flags: list[str]) -> str:
    """Plan a run; returns the line that says what is wrong, or nothing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([*flags, "--dry-run"])
    lines = errors.getvalue().splitlines()
    assert code in (0, 2)
    complaints = [line for line in lines if line.startswith("error: ")]
    assert len(complaints) == (code == 2), lines
    assert "Traceback" not in errors.getvalue()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES
    return complaints[0] if complaints else ""


@pytest.fixture(scope="module")
def plan(workspace: Any) -> Callable[..., str]:
    """Plans a run with some flags changed, once as they are: what is imported late is not an input's fault."""

    def with_flags(*extra: str, **changes: Any) -> str:
        return run([*workspace.flags("fuzz", **changes), *extra])

    assert with_flags() == ""
    return with_flags


@fuzzed
@given(name=st.sampled_from(sorted(flag_names())), value=STRANGE)
def test_settings_of_any_value(plan: Any, tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    plan("--config", str(file))


@fuzzed
@given(
    text=st.text(max_size=40) | st.sampled_from(["- a", "a: b: c", "!!python/object/apply:os.system [ls]", "&a [*a]"])
)
def test_settings_of_any_text(plan: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    plan("--config", str(file))


@fuzzed
@given(name=st.sampled_from(sorted(flag_names().keys() - {"save", "load"})), value=st.text(max_size=12))
def test_flags_of_any_text(plan: Any, name: str, value: str) -> None:
    plan(f"--{name.replace('_', '-')}={value}")


@fuzzed
@given(file=st.sampled_from([".idx", ".bin"]), how=SPOILS)
def test_data_of_any_bytes(plan: Any, workspace: Any, tmp_path: Path, file: str, how: tuple[str, float, bytes]) -> None:
    for suffix in (".idx", ".bin"):
        shutil.copy(f"{workspace.data}{suffix}", tmp_path / f"text{suffix}")
    path = tmp_path / f"text{file}"
    path.write_bytes(spoil(path.read_bytes(), how))
    plan(data_path=tmp_path / "text")


@fuzzed
@given(file=st.sampled_from(["config.json", "model.safetensors"]), how=SPOILS)
@example(file="model.safetensors", how=("set", 0.0, b"\xff" * 8))
def test_sources_of_any_bytes(
    plan: Any, workspace: Any, tmp_path: Path, file: str, how: tuple[str, float, bytes]
) -> None:
    source = shutil.copytree(workspace.source, tmp_path / "source", dirs_exist_ok=True)
    (source / file).write_bytes(spoil((source / file).read_bytes(), how))
    plan(source=source)


@fuzzed
@given(data=st.data(), value=STRANGE, delete=st.booleans())
def test_sources_of_any_config(plan: Any, workspace: Any, tmp_path: Path, data: Any, value: Any, delete: bool) -> None:
    source = shutil.copytree(workspace.source, tmp_path / "source", dirs_exist_ok=True)
    content = json.loads((source / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(content)))
    del content[key]
    if not delete:
        content[key] = value
    (source / "config.json").write_text(json.dumps(content))
    plan(source=source)
