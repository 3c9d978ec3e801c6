"""Scoring groups of completions beside a padded transformers forward, as TRL's GRPO runs a model reward.

    python jobs/bench/score.py --model DIR --data FILE --groups 32 --group-size 8

The texts are real prompts of the data (the first of a seed-0 shuffle; of a row without a prompt, what its
sides share up to the line, or in one line the word, in which they part), each with `--group-size` completions
drawn by the same seed from all of the data's. A text above `--max-length` is left out and another completion
drawn.

The baseline is what `GRPOTrainer._calculate_rewards` does with a `PreTrainedModel`: right-padded ids and
their mask through the stock model, under `inference_mode`. It runs one forward for each group: that is GRPO's
default generation batch (8 prompts' completions a device, 8 generations each), and the fastest for it, since
a larger batch pads every text to a longer one. Ours is one `RewardModel.score_ids` call for all texts, as a
trainer with a larger generation batch makes it, planning and packing included; tokenization is counted for
neither, and padding and masking not for the baseline. Both take turns in this process, `--rounds` times.

`ratio` is our scores/s over the baseline's, the median of the rounds' ratios. `bound` is what counting tokens
allows: those of the padded groups over the distinct ones (each distinct beginning once). `share_of_bound` =
ratio / bound; above 1 where the last layer, computed at the pooled tokens alone, saves more than is lost.
`mfu` = (2 x non-embedding parameters x distinct tokens + attention over the (query, key) pairs computed) /
time / peak, the best of the matmuls before and after the rounds.
`--dtype bf16` gives both models bf16 weights; `--attn` takes the place of the path that RewardModel chooses.
No GPU has been measured yet: `--shape qwen2.5-0.5b --tokenizer DIR --dtype bf16 --attn varlen` (or `flex`).
Neither ray nor deepspeed nor trl is needed.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any, get_args

import torch
from measuring import (
    SEED,
    ModelCost,
    Stopwatch,
    bench_parser,
    compared,
    device_of,
    machine,
    matmul_peak,
    open_model,
    open_tokenizer,
    peak_memory,
    read_pairs,
    run_bench,
    shown,
)
from transformers import PreTrainedModel

from rayrm.data.messages import Text
from rayrm.data.packing import Ids, PackedBatch, pack_texts
from rayrm.data.preference import PreferenceRow, form_of
from rayrm.data.tokenize import TextForm, TextInput, encode
from rayrm.model.attention import AttentionPath
from rayrm.model.reward_model import LoadedModel, position_limit
from rayrm.serve.scorer import RewardModel

# Completions drawn for a prompt, in multiples of the group size, before a prompt too long for most is left.
_DRAWS = 3


def split_row(row: PreferenceRow) -> tuple[Text, list[Text]]:
    """The row's prompt and its completions; where the row gives no prompt, what its sides begin with."""
    sides = list(row.completions)
    if row.prompt:
        return row.prompt, sides
    alike = sum(
        1 for _ in takewhile(lambda parts: all(p == parts[0] for p in parts), zip(*sides, strict=False))
    )
    shared = sides[0][:alike]  # characters, or messages
    if isinstance(shared, str):
        shared = shared[: shared.rfind("\n" if "\n" in shared else " ") + 1]
    return shared, [side[len(shared) :] for side in sides]


@dataclass(frozen=True)
class Group:
    """A prompt, completions to score with it, and the ids of each text."""

    prompt: Text
    completions: list[Text]
    ids: list[Ids]


def draw_groups(
    rows: list[PreferenceRow], tokenizer: Any, *, groups: int, group_size: int, max_length: int
) -> tuple[TextForm, list[Group]]:
    """The text form of the rows, and the groups to score."""
    rng = random.Random(SEED)
    rows = [row for row in rows if row.ids is None]
    forms = {form_of(row) for row in rows}
    if len(forms) != 1:
        raise SystemExit(
            f"--data holds {' and '.join(sorted(forms)) or 'no'} rows; it must hold rows of texts, all "
            "strings or all message lists. Name another file"
        )
    form: TextForm = "standard" if forms == {"standard"} else "conversational"
    rng.shuffle(rows)
    split = [split_row(row) for row in rows]
    pool = [completion for _, completions in split for completion in completions if completion]
    prompts: list[Text] = []
    found: list[Group] = []
    for prompt, _ in split:
        if len(found) == groups:
            break
        if not prompt or prompt in prompts:
            continue
        prompts.append(prompt)
        drawn = rng.sample(pool, min(_DRAWS * group_size, len(pool)))
        encoded = encode(tokenizer, form, [TextInput(prompt, completion) for completion in drawn])
        fit = [(c, ids) for c, ids in zip(drawn, encoded, strict=True) if len(ids) <= max_length]
        if len(fit) >= group_size:
            kept = fit[:group_size]
            found.append(Group(prompt, [c for c, _ in kept], [ids for _, ids in kept]))
    if len(found) < groups:
        raise SystemExit(
            f"--groups ({groups}): the data has {len(found)} prompts with {group_size} completions of at "
            f"most {max_length} tokens. Lower it"
        )
    return form, found


class GrpoForward:
    """The stock model on right-padded groups, one forward each."""

    def __init__(
        self, model: PreTrainedModel, groups: Sequence[Sequence[Ids]], pad_token_id: int, device: torch.device
    ) -> None:
        self._model = model.to(device).eval()
        self._batches = [self._padded(group, pad_token_id, device) for group in groups]

    @staticmethod
    def _padded(sequences: Sequence[Ids], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids in sequences)
        ids = torch.full((len(sequences), longest), pad_token_id)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(sequences):
            ids[row, : len(own)] = torch.as_tensor(own)
            mask[row, : len(own)] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    @property
    def num_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self._batches)

    def scores(self) -> list[float]:
        with torch.inference_mode():
            found = torch.cat([self._model(**batch).logits[:, 0] for batch in self._batches])
        scores: list[float] = found.float().cpu().tolist()
        return scores


def timed(
    score: Callable[[], list[float]], device: torch.device, peaks: list[float]
) -> tuple[float, list[float]]:
    """Seconds, and the scores."""
    watch = Stopwatch(device)
    with peak_memory(device, peaks):
        watch.start()
        scores = score()
        return watch.stop(), scores


def batches_of(ours: RewardModel, sequences: Sequence[Ids], pad_token_id: int) -> list[PackedBatch]:
    """What our call computes, batch by batch."""
    queue = ours.queue()
    queue.add(0, sequences)
    batches = []
    while texts := queue.take():
        batches.append(pack_texts([text.ids for text in texts], pad_token_id, share=ours.layout == "shared"))
    return batches


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the result."""
    device = device_of(arguments)
    tokenizer = open_tokenizer(arguments)
    model = open_model(arguments)
    cost = ModelCost.of(model)
    if arguments.dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    form, drawn = draw_groups(
        read_pairs(arguments.data),
        tokenizer,
        groups=arguments.groups,
        group_size=arguments.group_size,
        max_length=arguments.max_length,
    )
    groups = [group.ids for group in drawn]
    baseline = GrpoForward(copy.deepcopy(model), groups, tokenizer.pad_token_id, device)
    loaded = LoadedModel(
        model.to(device).eval(), tokenizer, form, tokenizer.pad_token_id, position_limit(model)
    )
    ours = RewardModel(loaded, max_tokens_per_batch=arguments.max_tokens)
    if ours.layout == "padded" or ours.reach is not None:
        raise SystemExit(f"{type(model).__name__} pads some texts: this benchmark counts shared tokens")
    if arguments.attn is not None:
        ours._scorer.path = arguments.attn
    sequences = [ids for group in groups for ids in group]

    # Untimed: the first call of each builds what later calls reuse.
    ours.score_ids(groups[0])
    GrpoForward(baseline._model, groups[:1], tokenizer.pad_token_id, device).scores()

    sides: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: ours.score_ids(sequences),
        "padded": baseline.scores,
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    delta = 0.0
    peak_flops = matmul_peak(device, arguments.dtype)
    for number in range(arguments.rounds):
        scores: dict[str, list[float]] = {}
        for name, score in sides.items():
            seconds, scores[name] = timed(score, device, peaks[name])
            speeds[name].append(len(sequences) / seconds)
        delta = max(delta, *(abs(a - b) for a, b in zip(scores["ours"], scores["padded"], strict=True)))
        print(
            f"round {number + 1}: ours {speeds['ours'][-1]:.1f} scores/s, padded {speeds['padded'][-1]:.1f}, "
            f"ratio {speeds['ours'][-1] / speeds['padded'][-1]:.2f}",
            flush=True,
        )
    peak_flops = max(peak_flops, matmul_peak(device, arguments.dtype))
    batches = batches_of(ours, sequences, tokenizer.pad_token_id)
    tokens = {
        "padded": baseline.num_tokens,
        "unpadded": sum(len(ids) for ids in sequences),
        "distinct": pack_texts(sequences, tokenizer.pad_token_id).num_tokens,
        "computed": sum(batch.num_tokens for batch in batches),
        "batches": len(batches),
    }
    flops = cost.scoring(batches, tokens["distinct"])
    result = compare(arguments, ours, speeds["ours"], speeds["padded"], tokens) | {
        "max_score_delta": delta,
        "mfu": median(flops * speed / len(sequences) / peak_flops for speed in speeds["ours"]),
        "peak_gflops": peak_flops / 1e9,
    }
    if device.type == "cuda":
        result["peak_memory_gib"] = {name: max(found) for name, found in peaks.items()}
    return result | {"machine": machine(device)}


def compare(
    arguments: argparse.Namespace,
    model: RewardModel,
    ours: list[float],
    theirs: list[float],
    tokens: dict[str, int],
) -> dict[str, Any]:
    """Speeds, ratio, and the ratio that counting tokens allows."""
    found = compared("score", arguments, "scores_per_s", ours, theirs)
    bound = tokens["padded"] / tokens["distinct"]
    return found | {
        "groups": arguments.groups,
        "group_size": arguments.group_size,
        "max_tokens": model.max_tokens_per_batch,
        "attention_path": model._scorer.path,
        "bound": bound,
        "share_of_bound": found["ratio"] / bound,
        "tokens": tokens,
    }


def report(result: dict[str, Any]) -> None:
    """The result in words."""
    tokens = result["tokens"]
    print(
        f"ours {result['scores_per_s']:.1f} scores/s, padded {result['baseline_scores_per_s']:.1f}: "
        f"ratio {shown(list(result['ratio_spread'].values()))}, token bound {result['bound']:.2f}, "
        f"share of it {result['share_of_bound']:.2f}\n"
        f"tokens: padded {tokens['padded']}, unpadded {tokens['unpadded']}, distinct {tokens['distinct']}, "
        f"computed {tokens['computed']} in {tokens['batches']} batches\n"
        f"max score delta {result['max_score_delta']:.1e}; MFU {result['mfu']:.2f} of a matmul peak of "
        f"{result['peak_gflops']:.0f} GFLOP/s"
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.add_argument("--groups", type=int, default=32, help="how many prompts")
    parser.add_argument("--group-size", type=int, default=8, help="completions a prompt")
    parser.add_argument("--max-tokens", type=int, help="a batch's token budget (default: RewardModel's)")
    parser.add_argument("--attn", choices=get_args(AttentionPath), help="attention path (default: chosen)")
    return parser.parse_args(words)


if __name__ == "__main__":
    run_bench(parse_arguments(), measure, report)
