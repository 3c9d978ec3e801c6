"""What an output directory may be used for: begin, go on, or a refusal that says what to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrm.config import DataConfig, ModelConfig, RewardConfig
from rayrm.errors import CheckpointError, ConfigError, RunDirectoryError
from rayrm.runfile import Run, dump_run
from rayrm.train.checkpoint import TrainState
from rayrm.train.records import RunLog, read_progress, read_records
from rayrm.train.rundir import (
    RunStart,
    check_resume,
    check_writable,
    claim,
    examine,
    identity_of,
    only_run,
    record_budget,
)
from tests.whole_checkpoint import save_whole


def identity(data: str = "abc", rows: int = 8, **settings: Any) -> dict[str, Any]:
    return identity_of(
        RewardConfig(**settings), model="org/base", adapter=None, data=data, rows_per_step=rows
    )


def save(root: Path, step: int, max_tokens: int | None = None) -> Path:
    return save_whole(root, TrainState(step=step, max_tokens=max_tokens))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was cut off after its second checkpoint."""
    directory = tmp_path / "run"
    claim(directory, identity(), 4096, "# run\n")
    save(directory, 10)
    save(directory, 20)
    return directory


def finish(directory: Path) -> None:
    (directory / "progress.json").write_text(json.dumps({"step": 30, "num_steps": 30, "finished": True}))


def test_an_empty_or_absent_directory_begins_a_run(tmp_path: Path) -> None:
    assert examine(tmp_path, identity(), resume=None) == RunStart(None, None)
    assert examine(tmp_path / "absent", identity(), resume=None) == RunStart(None, None)


def test_claiming_writes_who_owns_the_directory(begun: Path) -> None:
    assert json.loads((begun / "identity.json").read_text())["identity"] == identity()
    assert (begun / "run.toml").read_text() == "# run\n"


@pytest.mark.parametrize("resume", [True, "true", "True"])
def test_a_run_that_was_cut_off_goes_on_from_its_newest_checkpoint(begun: Path, resume: bool | str) -> None:
    assert examine(begun, identity(), resume=resume) == RunStart(begun / "checkpoint-20", 4096)


@pytest.mark.parametrize("resume", [False, "false", "none", None])
def test_a_run_is_not_gone_on_with_by_any_word_for_no(begun: Path, resume: Any) -> None:
    with pytest.raises(RunDirectoryError, match="did not finish"):
        examine(begun, identity(), resume=resume)


@pytest.mark.parametrize("given", [str, Path])
def test_a_checkpoint_is_the_same_by_its_path_and_by_its_name(
    begun: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one too, which workers could not find."""
    with pytest.raises(CheckpointError, match="not the newest"):
        examine(begun, identity(), resume=given(begun / "checkpoint-10"))
    newest, other = begun / "checkpoint-20", begun.parent / "other"
    monkeypatch.chdir(begun)
    assert examine(begun, identity(), resume=given("checkpoint-20")).resume == newest
    assert examine(other, identity(), resume=given("checkpoint-20")) == RunStart(newest, None, newest)
    check_resume(given("checkpoint-20"))
    for nowhere in (given("checkpoint-30"), given(begun / "checkpoint-30")):
        with pytest.raises(CheckpointError, match=f"`{begun}/checkpoint-30` is not a complete checkpoint"):
            check_resume(nowhere)
    assert (
        RewardConfig(resume_from_checkpoint=given("checkpoint-20")).resume_from_checkpoint == "checkpoint-20"
    )
    assert RewardConfig(given(begun)).output_dir == str(begun)


def test_what_the_trainer_itself_wrote_is_no_one_elses(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"not of a run of rayrm \(config.json\)"):
        examine(tmp_path, identity(), resume=None, own=frozenset({"trainer_state.json"}))
    own = frozenset({"trainer_state.json", "config.json"})
    assert examine(tmp_path, identity(), resume=None, own=own) == RunStart(None, None)


def test_the_newest_checkpoint_may_be_named(begun: Path) -> None:
    start = examine(begun, identity(), resume=str(begun / "checkpoint-20"))
    assert start == RunStart(begun / "checkpoint-20", 4096)


def test_the_command_line_goes_on_by_itself(begun: Path) -> None:
    assert examine(begun, identity(), resume=None, automatic=True).resume == begun / "checkpoint-20"


def test_a_run_cut_off_before_its_first_checkpoint_begins_again_with_its_budget(tmp_path: Path) -> None:
    claim(tmp_path, identity(), 512, "")
    assert examine(tmp_path, identity(), resume=True) == RunStart(None, 512)


def test_without_being_asked_it_does_not_go_on(begun: Path) -> None:
    with pytest.raises(RunDirectoryError, match="Pass `resume_from_checkpoint=True`"):
        examine(begun, identity(), resume=None)


def test_an_older_checkpoint_is_refused(begun: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not the newest checkpoint of .*\(checkpoint-20\)"):
        examine(begun, identity(), resume=str(begun / "checkpoint-10"))


def test_a_finished_run_is_refused(begun: Path) -> None:
    finish(begun)
    for resume in (None, True):
        with pytest.raises(RunDirectoryError, match=r"is finished.*choose another `output_dir`"):
            examine(begun, identity(), resume=resume, automatic=True)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (identity(learning_rate=1.0), "learning_rate: 0.0001 there, 1.0 here"),
        (identity(data="xyz"), "data: 'abc' there, 'xyz' here"),
        (
            identity(deepspeed={"communication_data_type": "bf16", "zero_optimization": {"stage": 3}}),
            "deepspeed: None there, {'communication_data_type': 'bf16'} here",
        ),
        (identity(rows=16), "rows_per_step: 8 there, 16 here"),
        (identity(seed=1, max_length=9), "max_length: 1024 there, 9 here; seed: 42 there, 1 here"),
    ],
)
def test_another_run_is_refused_by_what_differs(begun: Path, other: dict[str, Any], difference: str) -> None:
    with pytest.raises(RunDirectoryError, match="holds another run") as refusal:
        examine(begun, other, resume=True)
    assert difference in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 3},
        {"save_steps": 7},
        {"eval_strategy": "steps"},
        {"output_dir": "elsewhere"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"max_tokens_per_microbatch": 100},
        {"zero_stage": 3},
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}},
        {"deepspeed": {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "steps_per_print": 5}},
    ],
    ids=str,
)
def test_what_does_not_shape_the_trajectory_may_change(begun: Path, settings: dict[str, Any]) -> None:
    assert examine(begun, identity(**settings), resume=True).resume == begun / "checkpoint-20"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "model.safetensors", "checkpoint-5"])
def test_a_directory_of_someone_else_is_never_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match="not of a run of rayrm") as refusal:
        examine(tmp_path, identity(), resume=None)
    assert name in str(refusal.value)


def test_a_file_is_no_output_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        examine(tmp_path / "run", identity(), resume=None)


def test_resuming_where_nothing_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        examine(tmp_path, identity(), resume=True)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        examine(tmp_path, identity(), resume=str(tmp_path / "checkpoint-3"))


def test_a_run_goes_on_in_another_directory_and_keeps_its_budget(begun: Path, tmp_path: Path) -> None:
    start = examine(tmp_path / "new", identity(), resume=str(begun / "checkpoint-10"))
    assert start == RunStart(begun / "checkpoint-10", None, begun / "checkpoint-10")
    newest = save(begun, 30, max_tokens=512)
    assert examine(tmp_path / "new", identity(), resume=str(newest)) == RunStart(newest, 512, newest)


@pytest.mark.parametrize("copied", [False, True])
def test_a_checkpoint_of_another_run_is_refused_by_name_wherever_it_lies(
    begun: Path, tmp_path: Path, copied: bool
) -> None:
    """Its schedule, order and cursor would go on, and the settings of this run would be told and not hold."""
    checkpoint = save(begun, 30)
    if copied:
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint-30"))
    with pytest.raises(
        CheckpointError, match=r"of another run. They differ in seed: 42 there, 9 here.*`model.name="
    ):
        examine(tmp_path / "new", identity(seed=9), resume=str(checkpoint))
    assert examine(tmp_path / "new", identity(), resume=str(checkpoint)).resume == checkpoint


def test_a_checkpoint_that_does_not_say_whose_it_is_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save(tmp_path / "old", 30)
    assert examine(tmp_path / "new", identity(seed=9), resume=str(checkpoint)).resume == checkpoint
    assert "does not say which run it is of" in caplog.text


def test_a_checkpoint_from_before_budgets_were_written_still_resumes(begun: Path, tmp_path: Path) -> None:
    class Before(TrainState):
        def to_json(self) -> str:
            fields = json.loads(super().to_json())
            del fields["max_tokens"]
            return json.dumps(fields)

    old = save_whole(begun, Before(step=30))
    assert examine(tmp_path / "new", identity(), resume=str(old)) == RunStart(old, None, old)


def test_a_corrupt_checkpoint_is_found_before_anything_starts(begun: Path) -> None:
    (begun / "checkpoint-20" / "model.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match=r"is corrupt.*resume from `checkpoint-10`"):
        examine(begun, identity(), resume=True)


def test_records_beyond_the_checkpoint_are_dropped_and_each_step_stands_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, RewardConfig(), active=True)
    log.begin(0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 5, "lo')
    log = RunLog(tmp_path, RewardConfig(), active=True)
    log.begin(2)
    log.write({"step": 3, "loss": 0.5})
    assert [(r["step"], r["loss"]) for r in read_records(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    log.begin(0)
    assert read_records(tmp_path) == []


def test_a_rank_that_is_not_first_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", RewardConfig(), active=False)
    log.begin(0)
    log.write({"step": 1})
    log.progress(1, 2)
    log.summarize(TrainState(step=2))
    log.finish(TrainState(step=2), 2)
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "adapter_model.safetensors", "run.toml"])
def test_no_file_of_the_user_that_a_run_would_write_is_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match="would overwrite"):
        examine(tmp_path, identity(), resume=None)
    assert (tmp_path / name).read_text() == "precious"


def test_only_one_process_trains_in_a_directory(begun: Path) -> None:
    other = "from rayrm.train.rundir import only_run; from pathlib import Path; import sys\n"
    other += "with only_run(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", other, str(begun)]
    with only_run(begun):
        refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert f"process {os.getpid()}" in refused.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["identity.json", "progress.json"])
def test_a_damaged_record_is_named(begun: Path, name: str) -> None:
    (begun / name).write_text("{")
    with pytest.raises(RunDirectoryError, match=name):
        examine(begun, identity(), resume=True)


def test_what_a_power_loss_leaves_of_the_progress_is_no_reason_to_refuse(begun: Path) -> None:
    (begun / "progress.json").write_text("")
    assert examine(begun, identity(), resume=True).resume == begun / "checkpoint-20"
    assert read_progress(begun) == {}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is synced, in order: the name, and the size that it has then."""
    calls: list[tuple[str, int]] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        calls.append((name, os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    return calls


def test_what_makes_a_directory_a_run_s_survives_a_power_loss(
    tmp_path: Path, synced: list[tuple[str, int]]
) -> None:
    run = tmp_path / "run"
    claim(run, identity(), None, dump_run(Run(ModelConfig("base"), DataConfig("rows.jsonl"))))
    record_budget(run, 512)
    for name in ("identity.json", "run.toml"):
        # Its content under the name aside, and then the directory in which it is renamed.
        places = [at for at, (synced_name, _) in enumerate(synced) if synced_name.startswith(f".{name}.")]
        assert len(places) == 2
        assert synced[places[-1]][1] == (run / name).stat().st_size
        assert all(synced[at + 1][0] == "run" for at in places)


def test_of_the_progress_only_the_end_is_synced(tmp_path: Path, synced: list[tuple[str, int]]) -> None:
    log = RunLog(tmp_path, RewardConfig(), active=True)
    log.begin(0)
    synced.clear()
    log.progress(1, 2)
    assert read_progress(tmp_path)["step"] == 1
    assert synced == []
    log.finish(TrainState(step=2), 2)
    assert [name for name, _ in synced if "progress" in name]


def test_an_output_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="output_dir"):
        check_writable(Path("/proc/run"))


def test_a_run_that_goes_on_from_elsewhere_is_started_by_the_same_words_again(tmp_path: Path) -> None:
    save(tmp_path / "before", 7)
    before, home = tmp_path / "before" / "checkpoint-7", tmp_path / "run"
    first = examine(home, {"seed": 1}, resume=str(before))
    assert (first.resume, first.origin) == (before, before)
    claim(home, {"seed": 1}, None, "", first.origin)
    # Cut off before a checkpoint of its own: the same words, or none, go on from where it began.
    assert examine(home, {"seed": 1}, resume=str(before)).resume == before
    assert examine(home, {"seed": 1}, resume=None, automatic=True).resume == before
    save(home, 9)
    assert examine(home, {"seed": 1}, resume=str(before)).resume == home / "checkpoint-9"
