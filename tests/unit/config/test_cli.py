"""Flags, YAML and their precedence."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_prune.config import Config, PruneConfig, dump_yaml, load_config
from megatron_prune.config.schema import METRIC_ALIASES, PruneMetric, split_commas
from megatron_prune.config.yaml_file import Setting, read_yaml, settings, with_values
from megatron_prune.errors import ConfigError, UserError
from megatron_prune.pruning.metrics import Metric


def _write(directory: Path, text: str) -> str:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_are_the_defaults() -> None:
    assert load_config([]) == Config()


def test_precedence(tmp_path: Path) -> None:
    path = _write(tmp_path, "lr: 1e-4\nmin_lr: 1e-5\ntensorboard: true\n")
    config = load_config(["--config", path, "--lr", "2e-4", "--no-tensorboard"])
    assert (config.optim.lr, config.optim.min_lr, config.optim.weight_decay) == (2e-4, 1e-5, 0.1)
    assert config.run.tensorboard is False
    assert load_config([f"--config={path}"]).run.tensorboard is True


def test_flag_syntax() -> None:
    config = load_config(
        [
            *("--data-path", "220", "a/fineweb", "27.5", "b/owm"),
            *("--export-at", "1.1B, 800M"),
            *("--prune-axes", "ffn,stem"),
            *("--op-impl", "rms_norm=torch", "attention=torch"),
            *("--recompute", "--local_rank=3", "--global_batch_size", "8"),
        ]
    )
    assert config.data.data_path == ("220", "a/fineweb", "27.5", "b/owm")
    assert config.prune.export_at == ("1.1B", "800M")
    assert config.prune.prune_axes == ("ffn", "stem")
    assert config.train.op_impl == ("rms_norm=torch", "attention=torch")
    assert config.train.recompute
    assert config.train.global_batch_size == 8
    assert load_config(["--local_rank", "3"]) == Config()


def test_yaml_types_come_from_the_schema(tmp_path: Path) -> None:
    """YAML 1.1 alone would read 1:9 as 69, 1e-4 as a word, 220 as a number, null as a word to keep."""
    path = _write(
        tmp_path,
        "prune_ratio: 1:9\nlr: 1e-4\ndata_path: [220, data/a, 28.0, data/b]\nsource: 007\ntokenizer: null\n"
        "export_at: 1.1B,800M\nprune_axes: [ffn]\nop_impl: 'rms_norm=torch attention=torch'\ntrain_iters: 1_000\n",
    )
    config = load_config(["--config", path])
    assert config.prune.prune_ratio == "1:9"
    assert config.optim.lr == 1e-4
    assert config.data.data_path == ("220", "data/a", "28.0", "data/b")
    assert (config.model.source, config.model.tokenizer) == ("007", None)
    assert config.prune.export_at == ("1.1B", "800M")
    assert config.prune.prune_axes == ("ffn",)
    assert config.train.op_impl == ("rms_norm=torch", "attention=torch")
    assert config.train.train_iters == 1000


def test_other_names_of_the_metrics() -> None:
    others = {
        "param_first": "taylor",
        "param_second": "diag-hessian",
        "param_mix": "taylor-mixed",
        "diag-hess": "diag-hessian",
        "vectorize": "vectorize",
    }
    for name, metric in others.items():
        assert load_config(["--prune-metric", name]).prune.prune_metric == metric
    assert PruneConfig(prune_metric="param_first") == PruneConfig(prune_metric="taylor")
    names = {METRIC_ALIASES.get(name, name) for name in typing.get_args(PruneMetric)}
    assert names == set(typing.get_args(Metric)), "what the settings call a metric, the method knows"


def test_a_target_flag_replaces_the_other_kind_of_target_of_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "target_params: 457M\n")
    prune = load_config(["--config", path, "--target-shape", "hidden=8"]).prune
    assert (prune.target_params, prune.target_shape) == (None, "hidden=8")
    assert load_config(["--config", path, "--target-latency-ms", "8"]).prune.targets == {"--target-latency-ms": "8.0"}
    both = load_config(["--target-params", "1M", "--target-shape", "hidden=8"]).prune
    assert (both.target_params, both.target_shape) == ("1M", "hidden=8")  # for validate_config to complain about


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", r"run.yaml:1: unknown key 'learning_rate'"),
        ("lr: 1e-4\nglobal_batchsize: 8\n", r"run.yaml:2: .*did you mean global_batch_size\?"),
        ("lr: fast\n", r"run.yaml:1: lr is 'fast', expected a number"),
        ("train_iters: 1.5\n", "train_iters is '1.5', expected a whole number"),
        ("train_iters: null\n", "train_iters is 'null', expected a whole number"),
        ("recompute: 2\n", "recompute is '2', expected true or false"),
        ("precision: fp16\n", "precision is 'fp16', expected one of fp32, bf16"),
        ("optim: {lr: 1}\n", "unknown key 'optim'"),
        ("lr: {peak: 1}\n", "lr is a nested mapping, expected a number"),
        ("source: [a, b]\n", "source is a list, expected text"),
        ("data_path: {a: 1}\n", "data_path is a nested mapping, expected a list"),
        ('data_path: "a \'b"\n', "expected a list, or words separated by blanks"),
        ("lr: 1\nlr: 2\n", "run.yaml:2: lr is set twice"),
        ("- lr\n", "holds no 'key: value' lines"),
        ("lr: [1\n", "is not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []\n", "lr is a list, expected a number"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(["--config", _write(tmp_path, text)])
    assert "\n" not in str(caught.value)


def test_all_yaml_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", _write(tmp_path, "lr: fast\nsede: 3\nmin_lr: 0\n")])
    assert len(caught.value.problems) == 2


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read --config .*none.yaml: No such file"):
        load_config(["--config", str(tmp_path / "none.yaml")])


def test_empty_yaml(tmp_path: Path) -> None:
    assert load_config(["--config", _write(tmp_path, "# nothing\n")]) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train-itrs", "3"], r"unknown flag --train-itrs, did you mean --train-iters\?"),
        (["--train_itrs=3"], r"unknown flag --train_itrs, did you mean --train-iters\?"),
        (["--no-lr"], "unknown flag --no-lr"),
        (["--lr", "fast"], "--lr.*fast"),
        (["--precision", "fp16"], "fp16.*'fp32', 'bf16'"),
        (["--seed"], "--seed"),
        (["--config"], "--config: expected one argument"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_are_one_line(argv: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(argv)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isascii()
    assert capfd.readouterr() == ("", "")


def test_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--lr", "1e-3", "--print-config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load_config(["--config", _write(tmp_path, printed)]).optim.lr == 1e-3


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name in settings():
        assert f"--{name.replace('_', '-')}" in printed
    assert "SmolLM" not in printed
    assert "Optimizer steps of the run, both stages together." in printed


def test_every_field_has_a_docstring() -> None:
    """A field without one would have an empty line in --help."""
    import inspect

    for part in typing.get_type_hints(Config).values():
        source = inspect.getsource(part)
        for field in dataclasses.fields(part):
            after = source.split(f"\n    {field.name}: ", 1)[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), f"{part.__name__}.{field.name} has no docstring"


_WORDS = st.text(st.characters(codec="utf-8"), max_size=12)


def _values_of(setting: Setting) -> st.SearchStrategy[object]:
    """Any value a setting can hold, by its type."""
    annotation = setting.annotation
    options = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(options)
    if len(options) == 1 and type(None) in typing.get_args(annotation):
        return st.none() | _values_of(dataclasses.replace(setting, annotation=options[0]))
    if annotation in (int, float, bool, str):
        return {
            int: st.integers(),
            float: st.floats(allow_nan=False, allow_infinity=False),
            bool: st.booleans(),
            str: _WORDS,
        }[annotation]
    return st.lists(_WORDS, max_size=3).map(tuple)


@hypothesis_settings(max_examples=40)
@given(values=st.fixed_dictionaries({name: _values_of(setting) for name, setting in settings().items()}))
def test_dump_reads_back(values: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    config = with_values(Config(), values)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert with_values(Config(), read_yaml(str(path))) == config


def test_split_commas() -> None:
    assert split_commas(" a, b,,c ") == ("a", "b", "c")
    assert split_commas("") == ()
