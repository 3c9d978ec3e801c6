"""One service, one base, several reward adapters: scored as if merged, rolled one by one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from peft import LoraConfig

from rayrm.errors import PublishError, RollError
from rayrm.model.reward_model import load_model
from rayrm.serve.client import RewardClient
from rayrm.serve.deployment import deploy
from rayrm.serve.registry import PublishedModel, publish
from rayrm.serve.scorer import RewardModel
from tests.served import SAME, served, texts
from tests.tiny import save_tiny
from tests.unit.test_shared_bases import LORA, save_adapter


def expected_of(published: PublishedModel) -> list[float]:
    return RewardModel.from_pretrained(published.path, device="cpu").score(*texts(8))


@pytest.mark.ray
def test_two_adapters_share_a_base_and_a_roll_of_one_disturbs_no_other(
    ray_cluster: None, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", chat=False, initializer_range=0.2)

    def published(name: str, seed: int) -> PublishedModel:
        saved = save_adapter(tmp_path / f"{name}-{seed}", base, LoraConfig(**LORA), seed)
        return publish(saved, tmp_path / "registry", name, merge_lora=False)

    helpful, safe, later = published("helpful", 1), published("safe", 2), published("helpful", 3)
    right = {model.version: expected_of(model) for model in (helpful, safe, later)}
    of_base = sum(parameter.numel() for parameter in load_model(str(base)).parameters())
    lost: list[BaseException] = []
    answered: dict[str, int] = {}
    done = threading.Event()

    def ask(name: str) -> None:
        client = RewardClient("adapters", model=name)
        try:
            while not done.is_set():
                result = client.score(*texts(8))
                assert result.scores == pytest.approx(right[result.version], abs=SAME)
                answered[result.version] = answered.get(result.version, 0) + 1
        except BaseException as error:
            lost.append(error)

    with served({"helpful": helpful.path, "safe": safe.path}, "adapters") as reward:
        asking = [threading.Thread(target=ask, args=(name,)) for name in ("helpful", "safe")]
        for thread in asking:
            thread.start()
        rolled = reward.roll(later.version, model="helpful")
        assert rolled.version == later.version
        elsewhere = save_adapter(tmp_path / "elsewhere", base, LoraConfig(**LORA), 4)
        config = elsewhere / "adapter_config.json"
        config.write_text(config.read_text().replace(str(base), str(tmp_path / "absent")))
        without = publish(elsewhere, tmp_path / "registry", "helpful", merge_lora=False, make_current=False)
        with pytest.raises(RollError, match=r"the base of adapter .*absent.* is not a directory"):
            reward.roll(without.version, model="helpful")
        done.set()
        for thread in asking:
            thread.join()
        assert not lost
        assert answered[later.version] > 0
        assert answered[safe.version] > 0
        (status,) = reward.status()["replicas"]
        assert status["bases"] == {str(base): ["helpful", "safe"]}
        assert of_base < status["num_parameters"] < 2 * of_base
        assert reward.status()["models"] == {"helpful": later.version, "safe": safe.version}
    with pytest.raises(PublishError, match=r"needs its base model, and .*absent"):
        deploy({"helpful": without.path, "safe": safe.path}, "adapters")
