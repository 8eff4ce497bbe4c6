from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer

from megatron_prune.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from megatron_prune.errors import UserError

TEXT = "the quick\n    fox\té 漢字 🙂\r\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox", "a lazy dog watches two owls"] * 20),
            model_writer=stream,
            vocab_size=40,
            hard_vocab_limit=False,
            byte_fallback=False,
            minloglevel=2,
        )
    return path


def test_trained_bpe_is_lossless_and_has_the_size_asked_for(tokenizer_dir: Path) -> None:
    ours = load_tokenizer(str(tokenizer_dir))
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.vocab_size == 300
    assert max(ours.encode(TEXT)) < 300
    assert len(ours.encode("the quick brown")) < len("the quick brown")  # it did learn merges
    assert ours.decode([ours.eod_id]) == END_OF_TEXT


def test_trained_bpe_opens_in_transformers(tokenizer_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    ours = load_tokenizer(str(tokenizer_dir))
    assert theirs.eos_token == theirs.bos_token == END_OF_TEXT
    assert ours.eod_id == theirs.eos_token_id
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)


def test_directory_and_json_are_the_same_tokenizer(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    directory = load_tokenizer(str(tokenizer_dir))
    assert directory.fingerprint == tokenizer.fingerprint
    assert directory.encode(TEXT) == tokenizer.encode(TEXT)


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_model))
    ids = tokenizer.encode("the lazy fox")
    assert tokenizer.decode(ids) == "the lazy fox"
    assert tokenizer.eod_id == 2  # sentencepiece's own default for </s>
    assert tokenizer.eod_id not in ids
    assert max(ids) < tokenizer.vocab_size


def test_python_tokenizer(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("hi") == [107, 108]  # bytes plus three special tokens
    assert tokenizer.decode([107, 108]) == "hi"
    assert tokenizer.eod_id == 1
    assert tokenizer.vocab_size == 384


def test_settings_that_add_or_drop_tokens_are_ignored(tokenizer_dir: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    expected = backend.encode(TEXT).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=100)
    end = ("<|endoftext|>", 0)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[end])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    assert load_tokenizer(str(path)).encode(TEXT) == expected


def test_survives_pickling(tokenizer: Tokenizer, sentencepiece_model: Path) -> None:
    for original in (tokenizer, load_tokenizer(str(sentencepiece_model))):
        copy = pickle.loads(pickle.dumps(original))
        assert copy.encode("the fox") == original.encode("the fox")
        assert (copy.vocab_size, copy.eod_id, copy.fingerprint) == (
            original.vocab_size,
            original.eod_id,
            original.fingerprint,
        )


def test_ids_beyond_the_number_of_pieces_count(tokenizer_dir: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(piece for piece, number in vocabulary.items() if number == 65)] = 999
    path = tmp_path / "gap.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(str(path)).vocab_size == 1000


def test_fingerprint_follows_the_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = train_bpe(["entirely different words are learned here, completely unlike those before"] * 20, 300, tmp_path)
    assert other.vocab_size == tokenizer.vocab_size
    assert other.fingerprint != tokenizer.fingerprint


class TestMistakes:
    @pytest.mark.parametrize("name", ["/no/such/place", "no-such-tokenizer", "nobody/nothing", "a b", "x/y/z", ""])
    def test_unknown(self, name: str) -> None:
        with pytest.raises(UserError, match=f"unknown tokenizer {name}") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)

    def test_directory_without_one(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(UserError, match="unknown tokenizer") as caught:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_file_of_another_kind(self, tmp_path: Path) -> None:
        path = tmp_path / "words.txt"
        path.write_text("a")
        with pytest.raises(UserError, match="unknown tokenizer"):
            load_tokenizer(str(path))

    @pytest.mark.parametrize(
        ("name", "message"), [("x.json", "not a tokenizer.json"), ("x.model", "not a sentencepiece model")]
    )
    def test_damaged(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))

    def test_no_end_of_document(self, tmp_path: Path) -> None:
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
        path = tmp_path / "bare.json"
        backend.save(str(path))
        with pytest.raises(UserError, match="no end-of-document token"):
            load_tokenizer(str(path))

    def test_vocabulary_below_the_bytes(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="vocabulary of 256 is too small"):
            train_bpe(["text"], 256, tmp_path)

    def test_too_little_text(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="yields only"):
            train_bpe(["text"], 5000, tmp_path)
        assert list(tmp_path.iterdir()) == []
