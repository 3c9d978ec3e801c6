"""PPO in Ray actors whose reward is the deployed reward model: rollout, score, learn, in torch alone.

    python examples/ppo_actor.py --policy DIR --reward reward --prompts train.jsonl --heldout heldout.jsonl \
        --output-dir runs/ppo --steps 40 --seed 0
    python examples/ppo_actor.py --policy DIR --reward registry/helpful ... --num-actors 2

`--reward` is the name of a running service (`rayrm serve`), or a published model, which is then served for
the length of this run. `--policy` is a causal language model; its tokenizer need not be the reward model's,
which is given texts. The files have a column `prompt`: strings or message lists, as the reward model was
trained. Every field of `rayrm.rl.ppo.PPOSettings` is an option. With `--num-actors` each actor holds the
whole model and has its share of the prompts. A lost replica of the reward costs time and no reward; a lost
actor ends the run. What ends a run is told in one last line (a fault of the code, by a traceback); the exit
status is 2 for what you can mend, 1 for what failed, 130 for Ctrl-C, 143 for SIGTERM. After a SIGKILL of this
process the service that it started stays, under the name that was printed, until `ray.serve.delete(NAME)`.
The trained policy is saved before it is compared with the one that it began as. Held-out prompts are not
learned from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import secrets
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tomli_w
import torch
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrm import RewardClient, deploy
from rayrm.data.messages import Text
from rayrm.data.tokenize import TextInput
from rayrm.errors import ConfigError, ModelError, RayrmError, RunDirectoryError
from rayrm.own_ray import join_cluster
from rayrm.report.rl import write_rl_report
from rayrm.rl.ending import ON_SIGTERM, ending_on_sigterm, finishing_first
from rayrm.rl.guard import length_correlation, repetition
from rayrm.rl.heldout import Gain, paired_gain
from rayrm.rl.launch import reserve_room
from rayrm.rl.ppo import PPOSettings
from rayrm.rl.ppo_learner import Learner
from rayrm.rl.prompts import read_prompts, without_heldout
from rayrm.rl.service import scores_by_one_version
from rayrm.rl.trainer_config import check_policy
from rayrm.serve.connect import connect

GPU = torch.cuda.is_available()
SERVED_HERE = "ppo-reward"
ACTOR = {"CPU": 0.25, "GPU": 0.8} if GPU else {"CPU": 0.25}
REPLICA = {"CPU": 0.5, "GPU": 0.2} if GPU else {"CPU": 0.5}
LOSS_TOLD_S = 5.0
RUN_KEYS = ("policy", "reward", "prompts", "heldout", "heldout_prompts", "heldout_samples")
SAMPLE_KEYS = ("step", "prompt", "completion", "score", "reward", "version")


def step_record(
    name: str, number: int, rows: list[dict[str, Any]], calls: list[dict[str, Any]]
) -> dict[str, Any]:
    """A line of metrics.jsonl, under the names of TRL's GRPO and of its PPO; `reward` is the plain score."""
    column = {key: [row[key] for row in rows] for key in rows[0]}
    scores, lengths = np.array(column["score"]), np.array(column["length"])
    tokens, learned = float(lengths.sum()), {k: v for k, v in calls[0].items() if "/" in k}
    mean, deviation = float(scores.mean()), float(scores.std())
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in column["completion"]]
    record = {
        "step": number,
        "reward": mean,
        "reward_std": deviation,
        "kl": sum(column["kl"]) / tokens,
        "entropy": sum(column["entropy"]) / tokens,
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": 1 - float(np.mean(column["ended"])),
        "objective/kl": float(np.mean(column["nats"])),
        "objective/scores": float(np.mean(column["reward"])),
        **learned,
        f"rewards/{name}/mean": mean,
        f"rewards/{name}/std": deviation,
        f"{name}/score_mean": mean,
        f"{name}/score_std": deviation,
        f"{name}/latency_s": max(call["latency_s"] for call in calls),
        f"{name}/retries": sum(call["retries"] for call in calls),
        f"{name}/truncated": sum(call["truncated"] for call in calls) / len(rows),
        f"{name}/length_correlation": length_correlation(column["score"], column["length"]),
        f"{name}/repetition": float(np.mean([repetition(text) for text in texts])),
    }
    if column["spread"][0] is not None:
        record[f"{name}/spread"] = float(np.mean(column["spread"]))
    versions = Counter(column["version"])
    record |= {f"{name}/version/{version}": n / len(rows) for version, n in versions.items()}
    return {**record, "versions": sorted(versions)}


def prompts_of(options: argparse.Namespace) -> tuple[list[Text], list[Text]]:
    """The prompts to learn from, and those to compare on, which are none of the former."""
    heldout = read_prompts(options.heldout, options.heldout_prompts)
    rows = without_heldout(read_prompts(options.prompts), heldout)
    return [row["prompt"] for row in rows], [row["prompt"] for row in heldout]


def step_prompts(prompts: list[Text], settings: PPOSettings) -> Iterator[list[Text]]:
    """The prompts of each step: a new permutation whenever all have been taken."""
    generator = np.random.default_rng(settings.seed)
    waiting: list[Text] = []
    for _ in range(settings.steps):
        while len(waiting) < settings.prompts_per_step:
            waiting += [prompts[place] for place in generator.permutation(len(prompts))]
        taken, waiting = waiting[: settings.prompts_per_step], waiting[settings.prompts_per_step :]
        yield taken


def _free_address() -> str:
    """A free port of the node that this runs on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def reserve_actors(settings: PPOSettings, *, with_replica: bool = False) -> PlacementGroup:
    """Room for every actor at once, before any starts; `with_replica`: and for a replica beside them.

    Raises ClusterError, which says what was asked and what is there, where there is none within a minute.
    """
    actors, asked = [ACTOR] * settings.num_actors, f"{settings.num_actors} actors of {ACTOR}"
    remedy = "Lower --num-actors, or end what runs beside."
    if with_replica:  # Serve places it: its room is given back, and left by what the actors hold
        remove_placement_group(
            reserve_room([*actors, REPLICA], f"{asked} and a replica of {REPLICA}", remedy)
        )
    return reserve_room(actors, asked, remedy)


def start_actors(settings: PPOSettings, policy: str, reward: Any, room: PlacementGroup) -> list[Any]:
    """One actor for each rank, in `room`, which have met where there are several; they end with `room`."""
    place = str(Path(policy).resolve()) if Path(policy).exists() else policy
    learner = ray.remote(Learner)
    actors = [
        learner.options(
            num_cpus=ACTOR["CPU"],
            num_gpus=ACTOR.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(room, rank),
        ).remote(settings, place, reward, rank)
        for rank in range(settings.num_actors)
    ]
    if len(actors) > 1:
        (address,) = gathered([actors[0].__ray_call__.remote(lambda learner: _free_address())])
        gathered([actor.join.remote(address) for actor in actors])
    return actors


def gathered(answers: list[Any]) -> list[Any]:
    """What each rank answers, in their order. As soon as one failed it raises: the other ranks wait for it.

    Raises what a rank raised, or RayrmError with the rank whose actor is gone.
    """
    waiting = list(answers)
    while waiting:
        done, waiting = ray.wait(waiting)
        try:
            ray.get(done)
        except (RayTaskError, RayActorError) as error:
            raise _why(error, answers) from error
    return list(ray.get(answers))


def _why(error: RayTaskError | RayActorError, answers: list[Any]) -> Exception:
    """What to tell of `error`, the first of `answers` to fail."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RayrmError):
        return cause
    # Where an actor is lost torch.distributed may tell the other ranks (RuntimeError) before Ray tells us.
    ray.wait(answers, num_returns=len(answers), timeout=LOSS_TOLD_S if isinstance(cause, RuntimeError) else 0)
    for rank, answer in enumerate(answers):
        try:
            ray.get(answer, timeout=0)
        except RayActorError as lost:
            if lost.actor_init_failed:
                return RayrmError(f"the actor of rank {rank} did not start: {str(lost).splitlines()[-1]}")
            return RayrmError(
                f"the actor of rank {rank} is gone: its process was killed or ran out of memory, or its node "
                "went. The run ends here and cannot be gone on from. Start it again with a new --output-dir; "
                "if memory ran out, lower --prompts-per-step, --max-completion-length or --num-actors."
            )
        except (RayTaskError, GetTimeoutError):
            continue
    return error


def train(settings: PPOSettings, actors: list[Any], reward: Any, prompts: list[Text], output: Path) -> None:
    """Every step of the run, told on the console and in the run's directory."""
    name, ranks = reward.__name__, len(actors)
    with (output / "metrics.jsonl").open("w") as metrics, (output / "samples.jsonl").open("w") as samples:
        for number, taken in enumerate(step_prompts(prompts, settings), 1):
            parts = gathered(
                [actor.step.remote(number, taken[rank::ranks]) for rank, actor in enumerate(actors)]
            )
            rows = [row for rows, _ in parts for row in rows]
            record = step_record(name, number, rows, [call for _, call in parts])
            metrics.write(json.dumps(record) + "\n")
            samples.writelines(json.dumps({key: row[key] for key in SAMPLE_KEYS}) + "\n" for row in rows)
            metrics.flush()
            samples.flush()
            print(
                f"step {number}/{settings.steps}: score {record['reward']:+.3f} "
                f"(std {record['reward_std']:.3f})  kl {record['objective/kl']:.3f} nats  "
                f"approx-KL {record['policy/approxkl_avg']:.4f}  "
                f"clipped {record['policy/clipfrac_avg']:.3f}  "
                f"length {record['completions/mean_length']:.1f}  version {', '.join(record['versions'])}",
                flush=True,
            )


def compare(actors: list[Any], reward: Any, prompts: list[Text], num_samples: int, output: Path) -> Gain:
    """Fresh samples of the starting and of the trained policy on `prompts`, all scored by one version."""
    ranks = len(actors)
    parts = gathered(
        [actor.sample.remote(prompts[rank::ranks], num_samples) for rank, actor in enumerate(actors)]
    )
    sampled: list[list[list[Text]]] = [[[]] * len(prompts), [[]] * len(prompts)]
    for rank, part in enumerate(parts):
        for texts, of_rank in zip(sampled, part, strict=True):
            texts[rank::ranks] = of_rank
    asked = [
        TextInput(prompt, text)
        for texts in sampled
        for prompt, row in zip(prompts, texts, strict=True)
        for text in row
    ]
    scored, version = scores_by_one_version(reward, asked)
    scores = np.array(scored).reshape(2, len(prompts), num_samples).tolist()
    gain = paired_gain(*scores)
    kept = {
        "prompts": prompts,
        "before": scores[0],
        "after": scores[1],
        "gain": dataclasses.asdict(gain),
        "version": version,
        "samples_before": sampled[0],
        "samples_after": sampled[1],
    }
    (output / "heldout.json").write_text(json.dumps(kept))
    return gain


def count(word: str) -> int:
    """An argument that counts something."""
    if not re.fullmatch("[0-9]+", word) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number, at least 1")
    return int(word)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, PPOSettings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="directory or hub name of a causal language model")
    parser.add_argument(
        "--reward", default="reward", help="name of a service, or a published model's directory"
    )
    parser.add_argument("--prompts", required=True, help="jsonl file to learn from")
    parser.add_argument("--heldout", required=True, help="jsonl file to compare the policies on")
    parser.add_argument("--heldout-prompts", type=count, default=128, help="how many of its first rows")
    parser.add_argument("--heldout-samples", type=count, default=2, help="of each policy, for each of them")
    parser.add_argument("--output-dir", required=True, help="a new directory")
    for field in dataclasses.fields(PPOSettings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default)
    options = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(PPOSettings)]
    try:
        return options, PPOSettings(**{name: getattr(options, name) for name in names})
    except ConfigError as error:  # of fields, which are flags here
        said = re.sub(rf"`({'|'.join(names)})`", lambda name: f"--{name[1].replace('_', '-')}", str(error))
        parser.error(said)


@contextmanager
def running(options: argparse.Namespace, settings: PPOSettings) -> Iterator[tuple[list[Any], Any]]:
    """The actors of a run and its reward; what was started for it ends with the block.

    A service has a name of its own, so that runs side by side do not take each other's.
    """
    serve_here = Path(options.reward).is_dir()
    name = f"{SERVED_HERE}-{secrets.token_hex(4)}" if serve_here else options.reward
    room = reserve_actors(settings, with_replica=serve_here)
    try:
        if serve_here:
            print(f"serving {options.reward} as {name!r} for the length of this run", flush=True)
            reward = deploy(options.reward, name, num_cpus=REPLICA["CPU"], num_gpus=REPLICA.get("GPU", 0))
            reward.__name__ = SERVED_HERE  # in the log, where runs are laid side by side
        else:
            reward = RewardClient(name)
        yield start_actors(settings, options.policy, reward, room), reward
    finally:
        # The service first: the actors end with this process, of which `ray job stop` leaves little.
        with finishing_first("removing what was started"):
            if ray.is_initialized():
                if serve_here and name in serve.status().applications:
                    serve.delete(name)
                remove_placement_group(room)


def main(arguments: Sequence[str] | None = None) -> Gain:
    options, settings = parse(arguments)
    prompts, heldout = prompts_of(options)
    output = Path(options.output_dir).resolve()
    if output.exists() and any(output.iterdir()):
        raise RunDirectoryError(f"the output directory ({output}) is not empty; give a new one or remove it.")
    try:
        check_policy(options.policy, [{"prompt": prompt} for prompt in (*prompts, *heldout)])
    except ModelError as error:
        said = str(error).replace("`policy.name`", "--policy").replace("policy.name=", "--policy ")
        raise ModelError(said) from error
    output.mkdir(parents=True, exist_ok=True)
    run = {key: str(value) for key, value in vars(options).items() if key in RUN_KEYS}
    if Path(options.reward).is_dir():
        join_cluster(None)  # RAY_ADDRESS, else a Ray of its own: not another run's that happens to be here
    else:
        connect()
    with ending_on_sigterm(), running(options, settings) as (actors, reward):
        (output / "run.toml").write_text(tomli_w.dumps({"run": run, "ppo": dataclasses.asdict(settings)}))
        train(settings, actors, reward, prompts, output)
        gathered([actors[0].save.remote(str(output))])
        gain = compare(actors, reward, heldout, options.heldout_samples, output)
    print(
        f"held-out reward {gain.before:+.3f} -> {gain.after:+.3f}: gain {gain.gain:+.3f} "
        f"[{gain.low:+.3f}, {gain.high:+.3f}], 95% interval over {gain.num_prompts} prompts, "
        f"{gain.num_samples} fresh samples of each policy\n{write_rl_report(output)}"
    )
    return gain


def ended(arguments: Sequence[str] | None = None) -> int:
    """`main` as a command: its exit status, and in one last line what ended it, as `rayrm` tells it."""
    try:
        with ending_on_sigterm():
            main(arguments)
        return 0
    except KeyboardInterrupt:
        said, status = "interrupted", 128 + signal.SIGINT
    except SystemExit as left:
        if left.code in (0, 2):
            raise  # argparse has said why
        # SIGTERM: 143 of ours, another status of the handler that Ray has while it starts
        said, status = "ended by SIGTERM", ON_SIGTERM
    except (RayrmError, OSError) as error:
        print(f"ppo_actor: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"\nppo_actor: {said}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(ended())
