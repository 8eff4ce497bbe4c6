"""Source models: finding a Hugging Face directory, reading its configuration and its weights.

Only safetensors are read; pickle can run code. Nothing is skipped: a tensor this project doesn't know is an error,
because a model with a silently dropped part trains to something else.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import safetensors
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.checkpoint.hf_config import architecture_from_hf
from megatron_prune.errors import UserError

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_PATTERNS: Final = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
#: What makes up a tokenizer directory, in the formats transformers and sentencepiece write.
TOKENIZER_PATTERNS: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
HUB_PATTERNS: Final = ("*.json", "*.safetensors", *TOKENIZER_PATTERNS)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FLOAT_DTYPES: Final = ("F64", "F32", "F16", "BF16")
LM_HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
COMPARE_ROWS: Final = 4096  # rows of a tied head compared at a time, to keep both matrices out of memory


def resolve_source(source: str) -> Path:
    """Find a source model: a local directory, a local ``*.json`` config file, or a hub id that is downloaded.

    Raises:
        UserError: no such path, or a hub id that cannot be had or holds no safetensors.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".json"):
        return path
    if path.exists():
        raise UserError(f"source '{source}' is a file; give the model's directory (config.json, *.safetensors)")
    if not HUB_ID.fullmatch(source):
        raise UserError(f"source '{source}' looks like a path, but there is no such directory; check --source")
    try:
        snapshot = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source '{source}' is no local directory, and as a hub id it cannot be fetched ({reason}); "
            "check the name, the network and the access token, or give a local directory"
        ) from error
    if not _safetensors_files(snapshot):
        # A repository of pickles would otherwise look like a config without weights and start from random ones.
        raise UserError(
            f"hub repository '{source}' has no safetensors weights; convert it to safetensors, "
            "or give a local directory with only its config.json to start from random weights"
        )
    return snapshot


def read_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a directory, or the given ``*.json`` file.

    Raises:
        UserError: missing, unreadable or no JSON object.
    """
    return _read_json(path / CONFIG_FILE if path.is_dir() else path)


def read_architecture(path: Path) -> Architecture:
    """Architecture of a model directory (or config file) without touching its weights.

    Raises:
        UserError: see :func:`read_config` and :func:`architecture_from_hf`.
    """
    return architecture_from_hf(read_config(path))


def has_weights(path: Path) -> bool:
    """Whether a source has weights, pickled ones (which :class:`SourceWeights` refuses) included."""
    return bool(_safetensors_files(path) or _pickle_files(path))


def check_weights(path: Path) -> None:
    """See that a model directory's weights files are all there and whole, by their headings and sizes.

    Raises:
        UserError: there are none, or pickled, incomplete or damaged ones.
    """
    _tensor_files(path)


class SourceWeights:
    """Weights of a local model directory, checked at once and read one tensor at a time.

    Rotary ``inv_freq`` buffers of old exports and a tied head stored besides its equal embedding are tolerated.

    Args:
        path: directory with ``model.safetensors`` or a shard index.
        arch: what the directory must hold.

    Raises:
        UserError: no, pickled, damaged or incomplete weights; a missing or unknown tensor, or one of another shape
            or of no float dtype.
    """

    def __init__(self, path: Path, arch: Architecture) -> None:
        self.path = path
        self._files = _tensor_files(path)
        specs = tensor_specs(arch)
        self._names = tuple(spec.name for spec in specs)
        for name in self._names:
            if name not in self._files:
                raise UserError(f"source {path} lacks the tensor '{name}' that its config.json promises")
        extra = sorted(name for name in set(self._files) - set(self._names) if not name.endswith("rotary_emb.inv_freq"))
        if arch.tie_embeddings and LM_HEAD in extra:
            self._check_tied_head()
            extra.remove(LM_HEAD)
        if extra:
            raise UserError(
                f"source {path} holds {len(extra)} unknown tensor(s), the first '{extra[0]}'; "
                "it is no plain model of its family, and leaving a part out would change it"
            )
        for spec in specs:
            self._check_tensor(arch, spec)

    def names(self) -> tuple[str, ...]:
        """Logical names of all parameters in model order."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU in its stored dtype and logical shape."""
        with _open(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def _check_tensor(self, arch: Architecture, spec: TensorSpec) -> None:
        with _open(self._files[spec.name]) as file:
            stored = file.get_slice(spec.name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        expected = arch.tensor_shape(spec)
        if shape != expected:
            raise UserError(f"tensor '{spec.name}' in {self.path} has shape {shape}, config.json says {expected}")
        if dtype not in FLOAT_DTYPES:
            raise UserError(f"tensor '{spec.name}' in {self.path} is stored as {dtype}; give a full-precision model")

    def _check_tied_head(self) -> None:
        with _open(self._files[LM_HEAD]) as head_file, _open(self._files[EMBEDDING]) as embedding_file:
            head, embedding = head_file.get_slice(LM_HEAD), embedding_file.get_slice(EMBEDDING)
            equal = head.get_shape() == embedding.get_shape() and all(
                torch.equal(head[row : row + COMPARE_ROWS], embedding[row : row + COMPARE_ROWS])
                for row in range(0, head.get_shape()[0], COMPARE_ROWS)
            )
        if not equal:
            raise UserError(
                f"config.json in {self.path} says tie_word_embeddings, but the stored lm_head.weight differs from the "
                "embedding; set tie_word_embeddings to false if the head is meant"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; give a Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); is the download complete?") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; give a Hugging Face model directory")
    return content


def _safetensors_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) + sorted(path.glob("*.safetensors.index.json"))


def _pickle_files(path: Path) -> list[Path]:
    return [file for pattern in PICKLE_PATTERNS for file in sorted(path.glob(pattern))]


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of every stored tensor, taken from the files themselves and checked against the index."""
    if (path / WEIGHTS_FILE).exists():
        return dict.fromkeys(_stored_names(path / WEIGHTS_FILE), path / WEIGHTS_FILE)
    if (path / INDEX_FILE).exists():
        return _sharded_files(path)
    pickles = _pickle_files(path)
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when loaded; convert the source to safetensors "
            "(load it with transformers and save_pretrained it)"
        )
    raise UserError(f"source {path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a Hugging Face model directory")


def _sharded_files(path: Path) -> dict[str, Path]:
    index = path / INDEX_FILE
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; is the download complete?")
    for file_name in weight_map.values():
        plain = isinstance(file_name, str) and Path(file_name).name == file_name
        if not plain or not file_name.endswith(".safetensors"):
            raise UserError(f"{index} names the shard {file_name!r}; shards must be *.safetensors beside the index")
    files: dict[str, Path] = {}
    for file_name in sorted(set(weight_map.values())):
        for name in _stored_names(path / file_name):
            if name in files:
                raise UserError(f"tensor '{name}' is in both {files[name].name} and {file_name} of {path}")
            files[name] = path / file_name
    for name, file_name in weight_map.items():
        if files.get(name) != path / file_name:
            raise UserError(f"{index} says tensor '{name}' is in {file_name}, but it is not; is the download complete?")
    return files


def _stored_names(file: Path) -> list[str]:
    with _open(file) as handle:
        return list(handle.keys())


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file; safe_open has no type stubs."""
    try:
        handle = safetensors.safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise UserError(f"the shard {file} is missing; is the download complete?") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is no readable safetensors file ({error}); is the download complete?") from error
    with handle as opened:
        yield opened
