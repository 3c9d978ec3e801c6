"""slime's custom reward: `--custom-rm-path rayrm.rl.slime.reward`, with or without `--group-rm`.

slime awaits it for one sample, or with `--group-rm` for the samples of a prompt, in the event loop of its
rollout; calls that arrive together travel together, and one group is scored by one version. It passes no
settings: the environment variables of `service.py` name the service and its model. Over HTTP the same scores
come from `--rm-type remote_rm --rm-url http://host:8000/reward`. Contract read from THUDM/slime 0.3.1
(624b824a): `slime/rollout/rm_hub/__init__.py`, `slime/rollout/sglang_rollout.py`, `slime/utils/types.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrm.data.messages import answer_to
from rayrm.data.tokenize import TextInput
from rayrm.errors import ScoreError
from rayrm.rl.service import reward_service
from rayrm.serve.request import Scorable, ScoreRequest, check_none_refused, text_scorable


async def reward(args: Any, sample: Any, **kwargs: Any) -> Any:
    """The reward of a `slime.utils.types.Sample`, a float; of a list of them, a list in their order.

    Args:
        args: slime's arguments; `kwargs`: what a rollout of the user's adds. Neither has a part in a score.
        sample: a string `prompt` is rendered text, as slime's `--apply-chat-template` leaves it, and goes
            before the response as it is, with what the template writes after the
            end-of-turn token; one of messages is a dialogue that the response answers.

    The version that scored stands in each sample's `metadata["reward_version"]`.

    Raises:
        ScoreError: a sample that cannot be scored (named).
        RewardUnavailableError: no such application, or no answer before the deadline.
    """
    samples: Sequence[Any] = sample if isinstance(sample, list) else [sample]
    if not samples:
        return []
    if any(isinstance(one, list) for one in samples):
        raise ScoreError(
            "`sample` is a list of lists: a custom generate function made several samples of one, and "
            "`--group-rm` hands them on as they are. Leave `--group-rm` out, or set their rewards in it."
        )
    inputs = [_input(one, place) for place, one in enumerate(samples)]
    check_none_refused(inputs)
    client = reward_service()
    result = await client.ask(ScoreRequest(inputs, client.model))
    for one in samples:
        if isinstance(one.metadata, dict):
            one.metadata["reward_version"] = result.version
    return result.scores if isinstance(sample, list) else result.scores[0]


def _input(sample: Any, place: int) -> Scorable:
    rendered = isinstance(sample.prompt, str)
    answer = answer_to(sample.prompt, sample.response)
    entry = TextInput(sample.prompt, answer, rendered=rendered, complete_turn=rendered)
    return text_scorable(f"samples[{place}].prompt", f"samples[{place}].response", entry)
