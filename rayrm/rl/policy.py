"""One policy worker from start to saved policy: TRL's trainer, whose reward is the service. Knows no Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PrinterCallback

from rayrm.rl.fresh_answers import FreshAnswers
from rayrm.rl.prompts import prompt_set
from rayrm.rl.run_log import SHAPING, KeepShaping, Report, RunLog, last_checkpoint
from rayrm.rl.settings import RLRun
from rayrm.rl.trainer_config import trainer_config
from rayrm.rl.trl import AsyncTRLReward, TRLReward
from rayrm.serve.client import RewardClient
from rayrm.train.launch import peft_settings


@dataclass(frozen=True, slots=True)
class PolicyJob:
    """What every rank is told: `prompts` and `heldout` are rows with a `prompt`."""

    run: RLRun
    clients: dict[str, RewardClient]
    gold: RewardClient | None
    prompts: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    report: Report | None = None
    """Makes the report of the run's directory, now and then."""


def train_policy_rank(job: PolicyJob) -> None:
    """Train on this rank to the end; rank 0 writes the run directory.

    Goes on from the last whole checkpoint of the directory where there is one (`save_steps` of the trainer).
    """
    run = job.run
    reward = TRLReward(
        job.clients,
        weights=run.reward.weights,
        shaping=run.shaping,
        gold=job.gold,
        truncation=run.reward.truncation,
        samples=run.output_dir,
    )
    trainer = _trainer(job, reward)
    checkpoint = last_checkpoint(run.output_dir, with_shaping=run.shaping.normalize)
    if checkpoint is not None and run.shaping.normalize:
        reward.load_state_dict(json.loads((checkpoint / SHAPING).read_text(encoding="utf-8")))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.accelerator.wait_for_everyone()


def _end_at_max_steps(trainer: Any) -> None:
    """Train no step beyond `max_steps`, as transformers does when it goes on from that very step.

    So a run that was cut off when its last step was done and saved is only measured.
    """
    run_epoch = trainer._run_epoch

    def within_max_steps(**given: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**given)
        else:
            trainer.control.should_training_stop = True

    trainer._run_epoch = within_max_steps


def _trainer(job: PolicyJob, reward: TRLReward) -> Any:
    from trl import GRPOTrainer, RLOOTrainer

    run = job.run
    answers = FreshAnswers(job.heldout, run.prompts.samples_per_prompt, reward, run.output_dir)
    trainer = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[run.algorithm](
        model=run.policy.name,
        reward_funcs=AsyncTRLReward(reward) if run.reward.asynchronous else reward,
        args=trainer_config(run, len(job.heldout)),
        train_dataset=prompt_set(job.prompts),
        processing_class=AutoTokenizer.from_pretrained(run.policy.name, padding_side="left"),
        peft_config=None if run.policy.lora is None else peft_settings(run.policy.lora, "CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.is_main_process:
        trainer.add_callback(RunLog(run.output_dir, run.guard, job.report))
        trainer.add_callback(KeepShaping(reward))
    _end_at_max_steps(trainer)
    answers.trainer = trainer
    trainer.add_callback(answers)
    return trainer
