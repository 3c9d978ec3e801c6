"""Rounds of training that follow a policy: samples are judged, the served model is trained on, and rolled to.

A round goes gather -> train -> measure -> publish -> roll, while RL and the service run on. What each step
leaves in `output_dir/round-N` is whole or absent, so the same command goes on with the step that was cut off:

    pairs.jsonl      the round's rankings (and what led to them: `refresh_pairs.py`)
    round.json       the version that it trains from, and which refused rounds' pairs it takes along
    replay.jsonl     rows of the original preferences, drawn anew for each round
    model/           the run directory of the training
    measured.json    both models on the held-out pairs and on the probe
    outcome.json     how it ended; `output_dir/rounds.jsonl` has a line of each

A round that is refused leaves the service as it is; its pairs go into the next round's training. Beside RL
and the service the cluster needs room for `[cluster]`'s workers (none: the training is in this process) and
a CPU that reads rows; this process holds one model in float32 at a time, to measure and to publish it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayrm.config import DataConfig, ModelConfig, SourceConfig
from rayrm.data.quarantine import QUARANTINE
from rayrm.data.selection import Selection, excluded_prompts
from rayrm.errors import ConfigError, NoRowLeftError, PublishError, RollError, RunDirectoryError, writing
from rayrm.evaluation.gate import broken_rules, check_gate
from rayrm.evaluation.gate_settings import read_gate
from rayrm.logs import show_logs
from rayrm.rl.judge import Judge, load_judge
from rayrm.rl.refresh_gate import Measured, Share, accuracy_of, check_compares, measure, probe_file, refusal
from rayrm.rl.refresh_outcomes import (
    Outcome,
    best_of,
    log_outcomes,
    read_outcomes,
    round_directory,
    write_outcome,
)
from rayrm.rl.refresh_pairs import PAIRS, Gathered, gather, last_cursor
from rayrm.rl.refresh_replay import draw_replay, num_replayed, write_replay
from rayrm.rl.refresh_samples import Place, SampleReader
from rayrm.rl.refresh_settings import Refresh, dump_refresh, read_refresh
from rayrm.runfile import Run
from rayrm.serve.calibration import calibration_files
from rayrm.serve.client import RewardClient
from rayrm.serve.connect import connect
from rayrm.serve.registry import MANIFEST, PublishedModel, open_published, publish
from rayrm.serve.saved import read_json
from rayrm.train.checkpoint import IDENTITY
from rayrm.train.holding import holding
from rayrm.train.launch import absolute_source, train_run
from rayrm.train.records import read_progress, replace_text
from rayrm.train.rundir import read_finished

logger = logging.getLogger("rayrm.rl")

_SETTINGS = "refresh.toml"
REFUSED = "refused-in-training"
_ROLLING = "rolling.txt"
"""In a round's directory from its roll on: the version that was rolled to."""
_SAY_EVERY_S = 60.0
_SAME = ("service", "model", "registry", "name", "samples")


def refresh(settings: Refresh) -> list[Outcome]:
    """Run rounds until `max_rounds` are there, or for ever; returns the outcomes of all in `output_dir`.

    Raises:
        ConfigError: a judge that is not there, a service that serves what is not published in `registry`.
        DataError: held-out rows by which no two models can be compared.
        RunDirectoryError: another process refreshes in `output_dir`, or it is another service's.
        DataError, ScoreError: samples that cannot be read, a judge that breaks its contract.
        RewardUnavailableError, RollError: the service is not there.
        What `train_run` raises; PreemptedError after SIGTERM in a training. The same command goes on.
    """
    show_logs()
    config = settings.refresh
    home = Path(config.output_dir).expanduser().absolute()

    def refuse(holder: str) -> None:
        raise RunDirectoryError(
            f"another process refreshes in `{home}` ({holder}). Wait for it to end, or choose another "
            "`output_dir`."
        )

    with load_judge(config.judge, concurrency=config.judge_concurrency) as judge:
        connect(settings.cluster.address, start=False)
        with holding(home / ".lock", refuse):
            _claim(home, settings)
            return _Rounds(home, settings, judge).run()


def _claim(home: Path, settings: Refresh) -> None:
    """Write the settings down; a directory of another service or of other samples is refused."""
    file = home / _SETTINGS
    if file.exists():
        before = read_refresh(file).refresh
        for key in _SAME:
            then, now = getattr(before, key), getattr(settings.refresh, key)
            if then != now:
                raise RunDirectoryError(
                    f"`output_dir` ({home}) holds another refresh: `{key}` is {then!r} there and {now!r} "
                    "here. Set it back to go on, or choose another `output_dir`."
                )
    with writing(file):
        replace_text(file, dump_refresh(settings))


class _Rounds:
    """The rounds of one service in one directory."""

    def __init__(self, home: Path, settings: Refresh, judge: Judge) -> None:
        self._home = home
        self._settings = settings
        self._judge = judge
        self._config = settings.refresh
        self._client = RewardClient(self._config.service)
        self._model = self._model_name()
        self._name = self._config.name or self._model
        given = absolute_source(settings.data.eval)
        self._eval: list[Any] = given if isinstance(given, list) else [given]
        check_compares(self._eval, settings.data.max_eval_pairs)
        self._gate = read_gate(self._config.gate) if self._config.gate else {}
        self._held_out = Selection(excluded=excluded_prompts(self._eval, name="eval"))
        self._said_at = 0.0

    def run(self) -> list[Outcome]:
        outcomes = read_outcomes(self._home)
        while self._config.max_rounds is None or len(outcomes) < self._config.max_rounds:
            outcomes.append(self._round(len(outcomes) + 1, outcomes))
            log_outcomes(self._home, outcomes)
        log_outcomes(self._home, outcomes)
        return outcomes

    def _round(self, number: int, before: list[Outcome]) -> Outcome:
        directory = round_directory(self._home, number)
        gathered = self._gather(directory, number)
        base, carried = self._begin(directory, before)
        version, reason, drawn = None, None, 0
        try:
            drawn = self._train(directory, number, base, gathered, carried)
        except NoRowLeftError as error:
            # Every restart would end so: the next round, with more rows, may not.
            reason = f"nothing can be trained on: {error}"
            found = Measured(accuracy_of(base.path, self._eval, self._settings.data.max_eval_pairs))
        else:
            found = self._measure(directory, base)
            reason = refusal(
                found,
                base.version,
                best=best_of(before),
                allowed_drop=self._config.allowed_drop,
                min_probe_agreement=self._config.min_probe_agreement,
            )
            if reason is None and self._gate:
                reason = broken_rules(check_gate(directory / "model", self._gate, base.path))
        if reason is None:
            version, reason = self._publish_and_roll(directory, base)
        outcome = Outcome(
            number,
            reason is None,
            reason,
            base.version,
            version,
            gathered.num_rows,
            sum(num_rows for _, num_rows in carried),
            drawn,
            int(read_progress(directory / "model").get("step", 0)),
            gathered.counts | self._refused_rows(directory, number),
            found.before,
            found.after,
            found.probe_agreement,
            time.time(),
        )
        write_outcome(self._home, outcome)
        if reason is None:
            logger.info(
                "round %d: %s serves %s in the place of %s; held-out accuracy %s, before %s",
                *(number, self._config.service, version, base.version, found.after, found.before),
            )
        else:
            logger.warning("round %d is refused, %s serves on: %s", number, base.version, reason)
        return outcome

    def _gather(self, directory: Path, number: int) -> Gathered:
        globs = self._config.samples
        served = self._served()
        self._calibrate(served)  # what is missing is told before samples are judged
        reader = SampleReader(
            [globs] if isinstance(globs, str) else globs,
            self._cursor(number),
            text_form=read_json(served.path / MANIFEST)["text_form"],
            held_out=self._held_out,
        )

        def wait(standing: str) -> None:
            if time.monotonic() - self._said_at > _SAY_EVERY_S:
                self._said_at = time.monotonic()
                logger.info("round %d waits for samples: %s", number, standing)
            time.sleep(self._config.poll_s)

        gathered = gather(directory, reader, self._judge, min_pairs=self._config.min_pairs, wait=wait)
        said = ", ".join(f"{count} {what}" for what, count in gathered.counts.items())
        logger.info("round %d has %d rows (%s)", number, gathered.num_rows, said)
        return gathered

    def _cursor(self, number: int) -> dict[str, Place]:
        """Behind what was taken last, in this round or the one before."""
        return last_cursor(round_directory(self._home, number)) or last_cursor(
            round_directory(self._home, number - 1)
        )

    def _begin(self, directory: Path, before: list[Outcome]) -> tuple[PublishedModel, list[tuple[Path, int]]]:
        """What the round trains from, and the pairs of the refused rounds just before it with their numbers.

        Decided when its training begins, and then kept.
        """
        file = directory / "round.json"
        if (directory / "model" / IDENTITY).exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            base = open_published(self._config.registry, self._name, kept["base"])
            return base, [(Path(path), num_rows) for path, num_rows in kept["carried"]]
        served = self._served()
        self._calibrate(served)
        carried: list[tuple[Path, int]] = []
        for outcome in reversed(before):
            if outcome.accepted:
                break
            carried.insert(0, (round_directory(self._home, outcome.round) / PAIRS, outcome.num_rows))
        content = {
            "base": served.version,
            "carried": [[str(path), num_rows] for path, num_rows in carried],
        }
        with writing(file):
            replace_text(file, json.dumps(content, indent=2))
        return served, carried

    def _train(
        self,
        directory: Path,
        number: int,
        base: PublishedModel,
        gathered: Gathered,
        carried: list[tuple[Path, int]],
    ) -> int:
        """Train from `base` on the round's rows, to the end; returns how many rows were replayed."""
        model_dir, replay = directory / "model", directory / "replay.jsonl"
        reward, data = self._settings.reward, self._settings.data
        if not (model_dir / IDENTITY).exists():
            num_rows = gathered.num_rows + sum(count for _, count in carried)
            wanted = 0 if data.replay is None else num_replayed(num_rows, data.replay_share)
            source = absolute_source(data.replay)
            rows = draw_replay(source, wanted, held_out=self._held_out, seed=number) if wanted else []
            write_replay(replay, rows)
        drawn = len(replay.read_bytes().splitlines())
        sources = [*(path for path, _ in carried), gathered.file, *([replay] if drawn else [])]
        run = Run(
            ModelConfig(str(base.path.absolute()), lora=self._config.lora),
            DataConfig(
                train=[SourceConfig(str(path), name=f"{path.parent.name} {path.stem}") for path in sources],
                eval=self._eval if reward.eval_strategy != "no" else None,
                max_eval_pairs=data.max_eval_pairs,
            ),
            # One row that the model's template refuses would stop a small round at every restart.
            dataclasses.replace(reward, output_dir=str(model_dir), max_bad_row_fraction=1.0),
            self._settings.cluster,
        )
        if not read_finished(model_dir):
            logger.info(
                "round %d trains from %s: %d rows of its own, %d of refused rounds, %d replayed",
                *(number, base.version, gathered.num_rows, sum(n for _, n in carried), drawn),
            )
            train_run(run)
        return drawn

    def _refused_rows(self, directory: Path, number: int) -> dict[str, int]:
        """How many rows the training left out, as `outcome.json` counts them."""
        file = directory / "model" / QUARANTINE
        num_refused = len(file.read_bytes().splitlines()) if file.exists() else 0
        if num_refused:
            logger.warning("round %d left out %d rows: the reasons are in %s", number, num_refused, file)
        return {REFUSED: num_refused} if num_refused else {}

    def _measure(self, directory: Path, base: PublishedModel) -> Measured:
        file = directory / "measured.json"
        if file.exists():
            fields = json.loads(file.read_text(encoding="utf-8"))
            shares = {name: Share(**fields[name]) for name in ("before", "after") if fields[name] is not None}
            return Measured(**{**fields, **shares})
        logger.info("measuring %s and the new model on the held-out pairs", base.version)
        found = measure(base, directory / "model", self._eval, self._settings.data.max_eval_pairs)
        with writing(file):
            replace_text(file, json.dumps(asdict(found), indent=2))
        return found

    def _publish_and_roll(self, directory: Path, base: PublishedModel) -> tuple[str | None, str | None]:
        """The version that was published (None: none was), and why it does not serve (None: it does)."""
        calibrate = self._calibrate(base)
        try:
            published = publish(
                directory / "model",
                self._config.registry,
                self._name,
                make_current=False,  # the roll does, where no replica refuses
                probe=probe_file(base, directory / "probe.jsonl"),
                calibrate=calibrate,
            )
        except PublishError as error:
            return None, f"it cannot be published: {error}"
        status = self._client.status(wait_s=600.0)
        serving = status["models"][self._model]
        began = directory / _ROLLING
        if (
            began.exists()
            and serving == base.version
            and status["before"].get(self._model) == published.version
        ):
            return published.version, f"it served, and the service was rolled back to {base.version}"
        if serving not in (base.version, published.version):
            return published.version, (
                f"the service was rolled to {serving} meanwhile, from which this round was not trained"
            )
        with writing(began):
            replace_text(began, published.version)
        try:
            self._client.roll(published.path, model=self._model)
        except (RollError, PublishError) as error:
            # Where the service is gone this raises, and the round stays unfinished.
            if self._version() != published.version:
                return published.version, f"the service refused it: {error}"
        return published.version, None

    def _calibrate(self, base: PublishedModel) -> dict[str, str]:
        """The texts of the calibrations that come with the answers of `base`, for its successor's."""
        return calibration_files(read_json(base.path / MANIFEST), self._config.calibrate)

    def _model_name(self) -> str:
        models = self._client.status()["models"]
        model = self._config.model or (next(iter(models)) if len(models) == 1 else None)
        if model not in models:
            raise ConfigError(
                f"`model` ({self._config.model!r}) names none of the models of {self._config.service!r}: "
                f"{', '.join(models)}. Type `refresh.model={next(iter(models), 'NAME')}`."
            )
        return str(model)

    def _version(self) -> str:
        version: str = self._client.status(wait_s=600.0)["models"][self._model]
        return version

    def _served(self) -> PublishedModel:
        """The version that serves now, in the registry."""
        status = self._client.status(wait_s=600.0)
        version = status["models"][self._model]
        registry = Path(self._config.registry)
        if not (registry / self._name / version / MANIFEST).is_file():
            raise ConfigError(
                f"`registry` ({self._config.registry!r}): the service {self._config.service!r} serves "
                f"{version} of {self._model!r}, and {str(registry / self._name)!r} has no such version. Type "
                "the registry that it was deployed from, and `refresh.name` where it has another name there."
            )
        place, mine = Path(status["places"][self._model]), registry / self._name / version
        if place.exists() and place.resolve() != mine.resolve():
            raise ConfigError(
                f"`registry` ({self._config.registry!r}): the service {self._config.service!r} serves "
                f"{version} from {str(place)!r}, and {str(mine)!r} is a copy: what is published there may be "
                f"gone when a replica starts anew. Type `refresh.registry={place.parent.parent}`."
            )
        return open_published(registry, self._name, version)
