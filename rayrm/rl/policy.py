"""One policy worker from start to saved policy: TRL's trainer, whose reward is the service. Knows no Ray.

Held-out prompts are answered by the policy as it starts and as it ends, through the trainer's own evaluation,
so that what generates in training generates here too; their scores are the reward model's, unshaped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from rayrm.errors import ConfigError, writing
from rayrm.rl.guard import HackingGuard
from rayrm.rl.heldout import paired_gain
from rayrm.rl.settings import RLRun
from rayrm.rl.trl import HELDOUT, AsyncTRLReward, HeldoutSample, TRLReward, versions_in
from rayrm.serve.client import RewardClient
from rayrm.settings import nearest

logger = logging.getLogger("rayrm.rl")

METRICS = "metrics.jsonl"
HELDOUT_FILE = "heldout.json"
_BEFORE = "heldout-before.json"
_SHAPING = "shaping.json"
_EVAL_BATCH_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class PolicyJob:
    """What every rank is told: `prompts` and `heldout` are rows with a `prompt`."""

    run: RLRun
    clients: dict[str, RewardClient]
    gold: RewardClient | None
    prompts: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def train_policy_rank(job: PolicyJob) -> None:
    """Train on this rank to the end; rank 0 writes the run directory.

    Goes on from the last checkpoint of the directory where there is one (`save_steps` of the trainer).
    """
    output_dir = job.run.output_dir
    reward = TRLReward(
        job.clients,
        weights=job.run.reward.weights,
        shaping=job.run.shaping,
        gold=job.gold,
        samples=output_dir,
    )
    trainer = _trainer(job, reward)
    first = trainer.accelerator.is_main_process
    if job.heldout and not (output_dir / _BEFORE).exists():
        before = _answer_heldout(trainer, job, reward, "before")
        if first:
            _write(output_dir / _BEFORE, [[dataclasses.asdict(one) for one in row] for row in before])
        trainer.accelerator.wait_for_everyone()
    checkpoint = get_last_checkpoint(str(output_dir))
    if checkpoint is not None and (kept := Path(checkpoint) / _SHAPING).exists():
        reward.load_state_dict(json.loads(kept.read_text(encoding="utf-8")))
    trainer.train(resume_from_checkpoint=checkpoint)
    if job.heldout:
        after = _answer_heldout(trainer, job, reward, "after")
        if first:
            kept = json.loads((output_dir / _BEFORE).read_text(encoding="utf-8"))
            before = [[HeldoutSample(**one) for one in row] for row in kept]
            _write(output_dir / HELDOUT_FILE, _compared(job, before, after))
        trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(output_dir))  # last: a directory with a policy is a finished run
    if first:
        (output_dir / _BEFORE).unlink(missing_ok=True)


def trainer_config(run: RLRun, num_heldout: int) -> Any:
    """TRL's config of `[rl]`, with defaults of ours: a log of every step, no tracker.

    `num_heldout`: prompts that are answered before and after.

    Raises ConfigError for a field that TRL's config does not have, or a value that it refuses.
    """
    from trl import GRPOConfig, RLOOConfig

    kind = {"grpo": GRPOConfig, "rloo": RLOOConfig}[run.algorithm]
    known = [one.name for one in dataclasses.fields(kind)]
    for name in run.trainer:
        if name not in known:
            raise ConfigError(f"`rl.{name}` is no field of {kind.__name__}.{nearest(name, known)}")
    samples = run.prompts.samples_per_prompt
    prompts_each = math.ceil(num_heldout / max(1, run.cluster.num_workers))
    fields = {
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_generations_eval": samples,
        "per_device_eval_batch_size": samples * max(1, min(_EVAL_BATCH_PROMPTS, prompts_each)),
        "ddp_find_unused_parameters": False,
        **_precision(run.cluster.use_gpu or run.cluster.num_workers == 0),
        **run.trainer,
    }
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"[rl] is refused by TRL's {kind.__name__}: {error}") from error


def _trainer(job: PolicyJob, reward: TRLReward) -> Any:
    from trl import GRPOTrainer, RLOOTrainer

    run = job.run
    config = trainer_config(run, len(job.heldout))
    function: Any = reward
    if run.reward.asynchronous:
        function = AsyncTRLReward.of(reward)
    trainer = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[run.algorithm](
        model=run.policy.name,
        reward_funcs=function,
        args=config,
        train_dataset=Dataset.from_list(job.prompts),
        processing_class=AutoTokenizer.from_pretrained(run.policy.name, padding_side="left"),
        peft_config=_adapters(run),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.is_main_process:
        trainer.add_callback(RunLog(run.output_dir))
        trainer.add_callback(KeepShaping(reward))
    return trainer


def _adapters(run: RLRun) -> Any:
    if run.policy.lora is None:
        return None
    from peft import LoraConfig

    lora = run.policy.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Rank 0's log: `metrics.jsonl`, a line of progress for each record, and what the guard warns of."""

    def __init__(self, output_dir: Path) -> None:
        self._file = output_dir / METRICS
        self._guard = HackingGuard()
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What follows the checkpoint that training goes on from is logged again."""
        kept = [record for record in read_metrics(self._file.parent) if record["step"] <= state.global_step]
        with writing(self._file):
            self._file.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        for record in kept:
            self._guard.see(record)
        self._began = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "reward" not in logs:
            return
        record = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        record |= {"step": state.global_step, "seconds": time.monotonic() - self._began}
        versions = versions_in(record)
        with writing(self._file), self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record | {"versions": versions}) + "\n")
        kl = f", KL {record['kl']:.4f}" if "kl" in record else ""
        logger.info(
            "step %d of %d: reward %+.3f (std %.3f)%s, %.1f tokens, version %s",
            state.global_step,
            state.max_steps,
            record["reward"],
            record["reward_std"],
            kl,
            record.get("completions/mean_length", float("nan")),
            " and ".join(versions) or "unknown",
        )
        for warning in self._guard.see(record):
            logger.warning("%s", warning)


class KeepShaping(TrainerCallback):  # type: ignore[misc]
    """Keeps with each checkpoint what the shaping has seen: every rank has seen the same."""

    def __init__(self, reward: TRLReward) -> None:
        self._reward = reward

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _write(
            Path(args.output_dir) / f"checkpoint-{state.global_step}" / _SHAPING, self._reward.state_dict()
        )


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of an RL run's `metrics.jsonl`, without a last line that was cut off."""
    file = output_dir / METRICS
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _answer_heldout(trainer: Any, job: PolicyJob, reward: TRLReward, when: str) -> list[list[HeldoutSample]]:
    """The policy's answers to each held-out prompt, of all ranks; the same seed before and after."""
    from accelerate.utils import gather_object

    reward.heldout = []
    asked = [{**row, HELDOUT: number} for number, row in enumerate(job.heldout)]
    with _own_seed(trainer.args.seed + trainer.accelerator.process_index):
        trainer.evaluate(Dataset.from_list(asked), metric_key_prefix=f"heldout_{when}")
    gathered: list[HeldoutSample] = gather_object(reward.heldout)
    rows = _by_prompt(gathered, job)
    if trainer.accelerator.is_main_process:
        mean = float(np.mean([sample.score for row in rows for sample in row]))
        logger.info("held-out prompts %s training: mean score %+.3f (%d prompts)", when, mean, len(rows))
    return rows


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


def _write(file: Path, content: Any) -> None:
    aside = file.with_suffix(".partial")
    with writing(file):
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        aside.replace(file)


def _compared(
    job: PolicyJob, before: list[list[HeldoutSample]], after: list[list[HeldoutSample]]
) -> dict[str, Any]:
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
        "prompts": [row["prompt"] for row in job.heldout],
        "before": rewards[0],
        "after": rewards[1],
        "gain": dataclasses.asdict(gain),
        "samples_before": texts[0],
        "samples_after": texts[1],
    }


def _by_prompt(samples: list[HeldoutSample], job: PolicyJob) -> list[list[HeldoutSample]]:
    """The samples of each prompt. A last batch may repeat prompts: of each the first ones count."""
    rows: list[list[HeldoutSample]] = [[] for _ in job.heldout]
    for sample in samples:
        if len(rows[sample.prompt]) < job.run.prompts.samples_per_prompt:
            rows[sample.prompt].append(sample)
    return rows


def _precision(may_use_gpu: bool) -> dict[str, Any]:
    """bf16 where the hardware computes it; else float32, on the CPU where there is no GPU."""
    if not may_use_gpu or not torch.cuda.is_available():
        return {"use_cpu": True, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}
    return {"bf16": torch.cuda.is_bf16_supported()}
