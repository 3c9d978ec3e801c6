"""Held-out prompts answered by the policy as it starts and as it ends, and compared.

Through the trainer's own evaluation, so that what generates in training generates here too. Their scores are
the reward model's, unshaped, and move no running statistics.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from rayrm.data.messages import answer_to
from rayrm.errors import ConfigError, RunDirectoryError
from rayrm.rl.heldout import paired_gain
from rayrm.rl.prompts import OF_TEMPLATE, prompt_set
from rayrm.rl.run_log import write_json
from rayrm.rl.trl import HELDOUT, HeldoutSample, TRLReward

logger = logging.getLogger("rayrm.rl")

HELDOUT_FILE = "heldout.json"
BEFORE_FILE = "heldout-before.json"
"""The starting policy's answers, which cannot be had again: kept until the run is finished."""
_Answers = list[list[HeldoutSample]]


class FreshAnswers(TrainerCallback):  # type: ignore[misc]
    """Asks all ranks for the answers when training begins and ends; rank 0 writes `heldout.json`.

    In callbacks, since only there the trainer has its model where it trains it (DeepSpeed's engine). The
    policy is saved before it is asked for the last time: what it learned is not lost with the service.
    """

    def __init__(
        self, rows: list[dict[str, Any]], samples_per_prompt: int, reward: TRLReward, output_dir: Path
    ) -> None:
        self.trainer: Any = None
        """Set when there is one."""
        self._rows = rows
        self._each = samples_per_prompt
        self._reward = reward
        self._output_dir = output_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = self._output_dir / BEFORE_FILE
        if not self._rows or before.exists():
            return
        if state.global_step:
            raise RunDirectoryError(
                f"{before} is gone: what the policy answered before its first step cannot be asked again at "
                f"step {state.global_step}. Put the file back, or begin anew in another `output_dir`."
            )
        answers = self._answers("before")
        if self.trainer.accelerator.is_main_process:
            write_json(before, [[dataclasses.asdict(sample) for sample in row] for row in answers])
        self.trainer.accelerator.wait_for_everyone()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_model(str(self._output_dir))
        if not self._rows:
            return
        after = self._answers("after")
        if self.trainer.accelerator.is_main_process:
            kept = json.loads((self._output_dir / BEFORE_FILE).read_text(encoding="utf-8"))
            before = [[HeldoutSample(**one) for one in row] for row in kept]
            before, after = self._by_one_version(before, after)
            write_json(self._output_dir / HELDOUT_FILE, self._compared(before, after))

    def _answers(self, when: str) -> _Answers:
        """The answers to each prompt, of all ranks; the same seed before and after."""
        from accelerate.utils import gather_object

        trainer = self.trainer
        self._reward.heldout = []
        asked = [{**row, HELDOUT: number} for number, row in enumerate(self._rows)]
        with _own_seed(trainer.args.seed + trainer.accelerator.process_index):
            trainer.evaluate(prompt_set(asked), metric_key_prefix=f"heldout_{when}")
        rows: _Answers = [[] for _ in self._rows]
        for sample in gather_object(self._reward.heldout):
            if len(rows[sample.prompt]) < self._each:  # a last batch may repeat prompts
                rows[sample.prompt].append(sample)
        if short := [number for number, row in enumerate(rows) if len(row) < self._each]:
            raise ConfigError(
                f"held-out prompt {short[0]} has {len(rows[short[0]])} answers instead of {self._each}: a "
                "setting of [rl] leaves out part of an evaluation. Delete what concerns evaluation there."
            )
        if trainer.accelerator.is_main_process:
            mean = float(np.mean([sample.score for row in rows for sample in row]))
            logger.info("held-out prompts %s training: mean score %+.3f (%d prompts)", when, mean, len(rows))
        return rows

    def _by_one_version(self, *both: _Answers) -> list[_Answers]:
        """The same answers, all scored by one version: the service may have rolled since the first were."""
        samples = [sample for rows in both for row in rows for sample in row]
        versions = sorted({sample.version for sample in samples})
        if len(versions) == 1:
            return list(both)
        logger.info("held-out answers were scored by %s: all are scored again", " and ".join(versions))
        rows = [self._rows[sample.prompt] for sample in samples]
        scores, version = self._reward.score_by_one_version(
            [row["prompt"] for row in rows],
            [answer_to(row["prompt"], sample.completion) for row, sample in zip(rows, samples, strict=True)],
            **{name: [row.get(name) for row in rows] for name in OF_TEMPLATE},
        )
        again = iter(
            dataclasses.replace(sample, score=score, version=version)
            for sample, score in zip(samples, scores, strict=True)
        )
        return [[[next(again) for _ in row] for row in rows] for rows in both]

    def _compared(self, before: _Answers, after: _Answers) -> dict[str, Any]:
        """What `heldout.json` holds."""
        both = (before, after)
        rewards = [[[sample.score for sample in row] for row in rows] for rows in both]
        texts = [[[sample.completion for sample in row] for row in rows] for rows in both]
        gain = paired_gain(*rewards, seed=0)
        logger.info(
            "held-out reward %+.3f -> %+.3f: gain %+.3f, 95%% interval %+.3f to %+.3f (%d samples each of %d "
            "prompts)",
            gain.before,
            gain.after,
            gain.gain,
            gain.low,
            gain.high,
            gain.num_samples,
            gain.num_prompts,
        )
        return {
            "prompts": [row["prompt"] for row in self._rows],
            "before": rewards[0],
            "after": rewards[1],
            "gain": dataclasses.asdict(gain),
            "version": after[0][0].version,
            "samples_before": texts[0],
            "samples_after": texts[1],
        }


@contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    """Random numbers of the block are those of `seed`; after it they go on as if none had been drawn."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        set_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
