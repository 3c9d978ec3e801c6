"""Run files: what is read is what was written, and what is wrong is named with its file, key and fix."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrm.config import ClusterConfig, DataConfig, LoraConfig, ModelConfig, RewardConfig, ServeConfig
from rayrm.errors import ConfigError
from rayrm.runfile import Run, dump_run, dump_tables, read_run, read_tables, split_settings

FIRST = """
[model]
name = "org/model"
[model.lora]
r = 8
[data]
train = ["a.jsonl", "b.jsonl"]
eval = {helpful = "h.jsonl", harmless = ["x.jsonl", "y.jsonl"]}
[reward]
output_dir = "runs/first"
learning_rate = 1e-5
max_length = "none"
zero_stage = 2
[cluster]
num_workers = 2
resources_per_worker = {CPU = 2}
[serve]
name = "judge"
"""
TEXT = st.text(st.characters(codec="utf-8"))
LEAST = ["model.name=m", "data.train=d.jsonl"]


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read_text(folder: Path, text: str, *overrides: str) -> Run:
    return read_run(run_file(folder, text), overrides)


def test_a_run_file_fills_every_section(tmp_path: Path) -> None:
    run = read_text(tmp_path, FIRST)
    assert run.model == ModelConfig("org/model", lora=LoraConfig(r=8))
    assert run.data.train == ["a.jsonl", "b.jsonl"]
    assert run.data.eval == {"helpful": "h.jsonl", "harmless": ["x.jsonl", "y.jsonl"]}
    assert (run.reward.learning_rate, run.reward.max_length, run.reward.zero_stage) == (1e-5, None, 2)
    assert run.cluster == ClusterConfig(num_workers=2, resources_per_worker={"CPU": 2})
    assert run.serve.name == "judge"


def test_overrides_win_and_a_bare_key_is_a_reward_key(tmp_path: Path) -> None:
    run = read_text(
        tmp_path, FIRST, "learning_rate=2e-6", "cluster.num_workers=8", "model.lora.alpha=64", "max_steps=1e3"
    )
    assert (run.reward.learning_rate, run.reward.max_steps) == (2e-6, 1000)
    assert (run.cluster.num_workers, run.model.lora) == (8, LoraConfig(r=8, alpha=64))


def test_the_last_of_two_overrides_wins() -> None:
    assert read_run(None, [*LEAST, "seed=1", "seed=2"]).reward.seed == 2


def test_overrides_alone_make_a_run() -> None:
    assert read_run(None, LEAST) == Run(ModelConfig("m"), DataConfig("d.jsonl"))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run_name=7", "7"),
        ("run_name=2026-11-23", "2026-11-23"),
        ("run_name=a=b", "a=b"),
        ('run_name="7"', "7"),
        ("run_name=x\nseed = 1", "x\nseed = 1"),
        ("run_name=", ""),
    ],
)
def test_a_value_that_is_no_toml_value_is_a_string(word: str, value: str) -> None:
    assert read_run(None, [*LEAST, word]).reward.run_name == value


def test_lists_tables_and_none_can_be_overrides() -> None:
    run = read_run(
        None,
        [
            *LEAST,
            'data.eval={a="x", b="y"}',
            "model.lora={}",
            "lr_scheduler_kwargs.num_cycles=2",
            "max_length=none",
        ],
    )
    assert run.data.eval == {"a": "x", "b": "y"}
    assert run.model.lora == LoraConfig()
    assert run.reward.lr_scheduler_kwargs == {"num_cycles": 2}
    assert run.reward.max_length is None
    assert read_run(None, [*LEAST, "model.lora=none"]).model.lora is None


def test_a_dumped_run_reads_back_equal(tmp_path: Path) -> None:
    run = read_text(
        tmp_path, FIRST, "report_to=tensorboard", "eval_strategy=steps", "resume_from_checkpoint=true"
    )
    run.reward.model_init_kwargs = {"num_hidden_layers": 6, "rope": {"type": "linear", "factors": [1.0, 2.5]}}
    text = dump_run(run)
    again = read_text(tmp_path, text)
    assert again == run
    assert dump_run(again) == text


@given(
    learning_rate=st.floats(0, 1e300),
    max_length=st.none() | st.integers(1, 2**40),
    run_name=st.none() | TEXT,
    zero_stage=st.none() | st.integers(0, 3),
    save_steps=st.floats(1e-6, 0.99) | st.integers(1, 10**9),
    train=TEXT.filter(bool) | st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    eval=st.none() | st.dictionaries(TEXT, TEXT.filter(bool), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_any_run_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, **values: object) -> None:
    sources = {name: values.pop(name) for name in ("train", "eval")}
    run = Run(ModelConfig("m"), DataConfig(**sources), RewardConfig("o", **values))  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("run") / "run.toml"
    path.write_text(dump_run(run), encoding="utf-8")
    assert read_run(path) == run


def test_a_torch_dtype_is_written_by_its_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    reward = RewardConfig(model_init_kwargs={"dtype": torch.bfloat16, "device_map": None})
    run = read_text(tmp_path, dump_run(Run(ModelConfig("m"), DataConfig("d"), reward)))
    assert run.reward.model_init_kwargs == {"dtype": "bfloat16"}


def test_a_value_that_toml_cannot_hold_is_refused_by_its_key() -> None:
    reward = RewardConfig(model_init_kwargs={"quantization_config": object()})
    with pytest.raises(ConfigError, match=r"reward\.model_init_kwargs\.quantization_config"):
        dump_run(Run(ModelConfig("m"), DataConfig("d"), reward))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[reward]\nlearning_rat = 1", ["`learning_rat`", "`learning_rate`", "[reward]"]),
        ("[rewards]\nseed = 1", ["`[rewards]`", "`reward`"]),
        ("learning_rate = 1", ["`learning_rate`", "outside", "[reward]"]),
        ("push_to_hub = true", ["`push_to_hub`", "[reward]"]),
        ("[model.lora]\nrank = 8", ["`rank` is no setting of LoraConfig"]),
        ("[cluster]\nnum_worker = 8", ["`num_worker`", "`num_workers`"]),
        ("[serve]\nnum_replicas = 0", ["`num_replicas` (0)", "greater than or equal to 1"]),
        ("[reward]\nseed = 'x'\nmax_length = -1", ["`seed` ('x')", "`max_length` (-1)"]),
        ("[reward]\nwarmup_ratio = 0.1", ["`warmup_ratio` (0.1)", "`warmup_steps`"]),
        ("cluster = 2", ["`cluster` (2)", "[cluster]"]),
        ("[data]\nmax_pairs = 3", ["`train` is missing"]),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file_and_the_fix(
    tmp_path: Path, text: str, says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, text)
    assert all(part in str(caught.value) for part in [*says, "run.toml"])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("learning_rate", "must be key=value"),
        ("=3", "must be key=value"),
        ("num_workers=2", "`cluster.num_workers=2`"),
        ("name=x", "`model.name=x` or `serve.name=x`"),
        ("model=x", "`model.name`"),
        ("clusters.num_workers=2", "`cluster`"),
        ("zero_stag=2", "`zero_stage`"),
        ("cluster.num_workers=two", "`num_workers` ('two')"),
        ("data.train.path=x", "`train` is 'd.jsonl', which has no keys"),
    ],
)
def test_a_mistake_in_an_override_says_what_to_type(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(None, [*LEAST, word])
    assert says in str(caught.value)


def test_every_section_tells_its_problems_in_one_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, "[model]\n[reward]\nseed = -1\n[cluster]\nnum_workers = -1\n[extra]\n")
    text = str(caught.value)
    assert all(
        part in text for part in ("[model] `name`", "`train`", "`seed` (-1)", "`num_workers` (-1)", "[extra]")
    )


def test_a_missing_unreadable_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml` does not exist"):
        read_run(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="is no TOML"):
        read_text(tmp_path, "[model]\nname = unquoted")
    (tmp_path / "latin.toml").write_bytes(b"[model]\nname = '\xe9'\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path / "latin.toml")


def test_a_run_without_sections_has_the_defaults_of_each() -> None:
    run = read_run(None, LEAST)
    assert (run.reward, run.cluster, run.serve) == (RewardConfig(), ClusterConfig(), ServeConfig())
    assert math.isclose(run.reward.learning_rate, 1e-4)


def test_a_written_run_holds_no_credentials(tmp_path: Path) -> None:
    url = "s3://key:secret@bucket/pairs?region=here"
    run = read_run(None, ["model.name=m", f"data.train={url}", f"data.eval=['{url}&token=secret']"])
    written = dump_run(run)
    assert "secret" not in written
    again = read_run(run_file(tmp_path, written))
    assert again.data.train == "s3://***@bucket/pairs?region=here"
    assert dump_run(again) == written
    with pytest.raises(ConfigError) as error:
        DataConfig(train=url, eval=url, eval_fraction=0.1)
    assert "secret" not in str(error.value)
    assert "s3://***@bucket" in str(error.value)


def test_a_file_of_other_sections_is_read_and_written_alike(tmp_path: Path) -> None:
    sections = {"serve": ServeConfig, "cluster": ClusterConfig}
    path = run_file(tmp_path, "[serve]\nname = 'judge'\n")
    read = read_tables(path, ["num_replicas=2", "cluster.num_workers=3"], sections, bare="serve")
    assert read == {
        "serve": ServeConfig(name="judge", num_replicas=2),
        "cluster": ClusterConfig(num_workers=3),
    }
    assert read_tables(run_file(tmp_path, dump_tables(read)), [], sections, bare="serve") == read


@pytest.mark.parametrize(
    ("text", "word", "says"),
    [
        ("[reward]", "num_replicas=1", r"`\[reward\]` is no section. Sections are serve, cluster"),
        ("", "num_workers=1", r"`num_workers` is no \[serve\] key. Type `cluster.num_workers=1`"),
        ("", "reward.seed=1", r"`reward` is no section. Sections are serve, cluster"),
        ("", "num_replica=1", r"\[serve\] `num_replica` .* Did you mean `num_replicas`"),
        ("", "num_replicas=1", r"\[cluster\] `address` is missing"),
    ],
)
def test_a_mistake_in_a_file_of_other_sections_is_told_by_its_own(
    tmp_path: Path, text: str, word: str, says: str
) -> None:
    sections = {"serve": ServeConfig, "cluster": ClusterConfig}
    with pytest.raises(ConfigError, match=says):
        read_tables(run_file(tmp_path, text), [word], sections, bare="serve", needs={"cluster": ["address"]})


def test_settings_among_words_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tie_model=x").write_text("")
    words = ["a.jsonl", "tie_model=davidson", "date=2026/b.jsonl", "reward.tie_parameter=1.5", "tie_model=x"]
    sources, found = split_settings(words)
    assert sources == ["a.jsonl", "date=2026/b.jsonl", "tie_model=x"]
    assert found == {"tie_model": "davidson", "tie_parameter": 1.5}
