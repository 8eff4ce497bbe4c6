"""The wrapper of llama.cpp's converter, around one that is made up: the real one comes with a source tree."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from megatron_prune.deployment.gguf import convert, pre_tokenizer_name
from megatron_prune.errors import MegatronPruneError, UserError

CONVERTER = """
import json, logging, pathlib, sys

class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

def main():
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("writer").info("output.weight, torch.float32 --> F16")
    print("Writing: 100%", file=sys.stderr)
    file = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
    file.write_text(json.dumps([TextModel().get_vocab_base_pre(None), *sys.argv[1:2], *sys.argv[-2:]]))
"""
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.fixture
def model(tmp_path: Path, repo_root: Path) -> Path:
    return Path(shutil.copytree(repo_root / "examples/demo/source", tmp_path / "export"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "llama_cpp_python" / "vendor" / "llama.cpp"
    root.mkdir(parents=True)
    (root / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return tmp_path / "llama_cpp_python"


@pytest.fixture(autouse=True)
def _forget_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)


def test_the_pre_tokenizer_is_named(
    source: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    arguments = list(sys.argv)
    assert convert(model, source, tmp_path / "a.gguf", "f16", None) == "gpt-2"
    assert json.loads((tmp_path / "a.gguf").read_text()) == ["gpt-2", str(model), "--outtype", "f16"]
    assert convert(model, source / "vendor" / "llama.cpp", tmp_path / "b.gguf", "f32", "qwen2") == "qwen2"
    assert json.loads((tmp_path / "b.gguf").read_text())[0] == "qwen2"
    assert capfd.readouterr() == ("", "")  # it is no terminal
    assert (root.handlers, root.level) == before
    assert sys.argv == arguments
    assert str(source) not in "".join(sys.path)


def test_an_unknown_pre_tokenizer_must_be_named(source: Path, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(MegatronPruneError, match="give --pre-tokenizer"):
        convert(model, source, tmp_path / "a.gguf", "f16", None)
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf.py"):
        convert(model, tmp_path, tmp_path / "a.gguf", "f16", None)


@pytest.mark.parametrize("last", ["raise AssertionError('no such tensor')", "sys.exit(1)", "file.unlink()"])
def test_a_converter_that_fails_leaves_nothing(source: Path, model: Path, tmp_path: Path, last: str) -> None:
    """Neither half a file, nor less than there was before."""
    (source / "vendor/llama.cpp/convert_hf_to_gguf.py").write_text(f"{CONVERTER}    {last}\n")
    (tmp_path / "old.gguf").write_text("whole")
    before = sorted(tmp_path.iterdir())
    for name in ("new.gguf", "old.gguf"):
        with pytest.raises(MegatronPruneError, match=r"gave up on .*|has written no (new|old).gguf"):
            convert(model, source, tmp_path / name, "f16", None)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.gguf").read_text() == "whole"


@pytest.mark.parametrize("content", [None, "", '{"a": ', "[]", '{"pre_tokenizer": ["ByteLevel"]}'])
def test_a_tokenizer_that_is_none(source: Path, model: Path, tmp_path: Path, content: str | None) -> None:
    (model / "tokenizer.json").unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"has no tokenizer.json|tokenizer.json is no tokenizer"):
        convert(model, source, tmp_path / "a.gguf", "f16", None)
    assert not (tmp_path / "a.gguf").exists()


def test_names_of_pre_tokenizers() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    assert (
        pre_tokenizer_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}}) == "smollm"
    )
    assert pre_tokenizer_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}}) == "gpt-2"
    assert pre_tokenizer_name({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}) is None
    assert pre_tokenizer_name({"pre_tokenizer": None}) is None


def test_the_demos_tokenizer(repo_root: Path) -> None:
    tokenizer = json.loads((repo_root / "examples/demo/source/tokenizer.json").read_text(encoding="utf-8"))
    assert pre_tokenizer_name(tokenizer) == "gpt-2"
