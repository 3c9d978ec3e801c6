"""Several adapters of one base in one process: the base's weights once, and each adapter's own beside them.

Each adapter has modules of its own, in which the base's parameters are the same tensors. So nothing is
switched between batches, adapters may differ in kind and rank, and one that comes or goes with a roll touches
no other. The base stays in memory while an adapter of it does. Scores are those of the merged model up to
rounding (float32: 1e-4), and cost the adapter's own products in each layer: where one model is served, merged
is faster (`reward_model.load_saved`).
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from rayrm.errors import ModelError
from rayrm.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, misfit, name_in_base, settings_of
from rayrm.model.layout import unwrapped
from rayrm.model.reward_model import (
    LoadedModel,
    grow_to,
    load_model,
    load_tokenizer,
    position_limit,
    read_facts,
    saved_form,
    set_pad_token,
)
from rayrm.serve.registry import MANIFEST, open_published
from rayrm.serve.scorer import RewardModel

logger = logging.getLogger("rayrm.serve")

_APART = ("LORA", "IA3")
"""What PEFT puts beside weights that it only reads. Its other kinds are merged into a base of their own."""
_READING_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base's weights as they are; PiSSA, OLoRA and others change them."""


class SharedWeights:
    """A base model in memory, without an adapter, never computed by itself.

    Holders say whether they need its weights on `device`: it leaves when nobody does, and dies with the last.
    """

    def __init__(self, name: str, model: PreTrainedModel, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.model: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        self.identities = {id(parameter) for parameter in self.model.parameters()}
        self._holders: set[int] = set()
        self._on_device: set[int] = set()
        # A holder may be collected, and dropped, in the middle of another's `take`.
        self._moving = threading.RLock()

    def take(self, holder: int) -> None:
        """From now on the weights are on the device for `holder`."""
        with self._moving:
            self._holders.add(holder)
            self._on_device.add(holder)
            self._move(self.device)

    def give(self, holder: int) -> None:
        """`holder` does not need the weights until it takes them again."""
        with self._moving:
            if holder in self._on_device:
                self._on_device.remove(holder)
                # Of the last holder that is gone nothing has to be kept.
                if self._holders and not self._on_device:
                    self._move(torch.device("cpu"))

    def drop(self, holder: int) -> None:
        """`holder` is no more."""
        with self._moving:
            self._holders.discard(holder)
            self.give(holder)

    def _move(self, device: torch.device) -> None:
        move_in_place(self.model.parameters(), device)

    def copy_with(self, own: Iterable[str]) -> PreTrainedModel:
        """The model in modules of its own, whose parameters are the base's but for those named in `own`."""
        named = set(own)
        memo: dict[int, Any] = {
            id(parameter): parameter for name, parameter in self.model.named_parameters() if name not in named
        }
        return copy.deepcopy(self.model, memo)


class AdapterModel(RewardModel):
    """A reward model whose base's weights may be other models' too; `base` holds them."""

    def __init__(
        self, loaded: LoadedModel, base: SharedWeights, holder: int, max_tokens_per_batch: int | None
    ) -> None:
        super().__init__(loaded, max_tokens_per_batch=max_tokens_per_batch)
        self.base = base
        self._holder = holder
        weakref.finalize(self, base.drop, holder).atexit = False

    def _move(self, device: torch.device) -> None:
        if device == self._device:
            self.base.take(self._holder)
        own = [p for p in self._scorer.parameters() if id(p) not in self.base.identities]
        move_in_place([*own, *self._scorer.buffers()], device)
        if device != self._device:
            self.base.give(self._holder)


class SharedBases:
    """The bases that adapters of this process share; each is loaded with its first adapter.

    `device` None: a GPU if there is one. Weights are float32.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._bases: weakref.WeakValueDictionary[Any, SharedWeights] = weakref.WeakValueDictionary()
        self._num_holders = 0
        self._opening = threading.Lock()

    def open(self, path: str | Path, *, max_tokens_per_batch: int | None = None) -> RewardModel:
        """Load the adapter in `path`, a published version (whose checksums are compared) or a saved one.

        One of a kind that changes its base's weights is merged into a base of its own, and the log says so.
        Raises PublishError for damaged files, ModelError for a base that is missing or does not fit.
        """
        directory = Path(path)
        if (directory / MANIFEST).is_file():
            directory = open_published(directory).path
        config = settings_of(directory)
        if reason := _not_apart(config, read_facts(directory)):
            logger.info("%s has a base of its own: %s", directory, reason)
            return RewardModel.from_pretrained(
                directory, device=self._device, max_tokens_per_batch=max_tokens_per_batch
            )
        with self._opening:
            base = self._base_of(directory, config)
            holder = self._num_holders = self._num_holders + 1
        base.take(holder)
        try:
            loaded = _load_adapter(directory, config, base)
            return AdapterModel(loaded, base, holder, max_tokens_per_batch)
        except BaseException:
            base.drop(holder)
            raise

    def _base_of(self, directory: Path, config: Any) -> SharedWeights:
        """The base in memory, or loaded; one whose files were replaced since is another."""
        name = config.base_model_name_or_path
        key = (str(Path(name).resolve()) if Path(name).is_dir() else name, config.revision, _stamps(name))
        base = self._bases.get(key)
        if base is None:
            revision = {"revision": config.revision} if config.revision else {}
            try:
                model = load_model(name, new_head=False, **revision)
            except ModelError as error:
                raise ModelError(f"the base of adapter `{directory}`: {error}") from error
            base = self._bases[key] = SharedWeights(name, model, self._device)
            logger.info("base %s is loaded, for all adapters of it", name)
        return base


def holds_adapter(path: str | Path) -> bool:
    """Whether a saved or published model is an adapter without its base."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def bases_of(models: Mapping[str, RewardModel]) -> dict[str, list[str]]:
    """The bases that are held apart, and the names of the models on each."""
    found: dict[str, list[str]] = {}
    for name, model in models.items():
        if isinstance(model, AdapterModel):
            found.setdefault(model.base.name, []).append(name)
    return found


def move_in_place(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Move the values of `tensors`, which stay the same objects: whoever holds them sees them moved."""
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _load_adapter(directory: Path, config: Any, base: SharedWeights) -> LoadedModel:
    """The adapter on the shared base, in eval mode; ModelError where the two do not fit."""
    from peft import PeftModel

    with safe_open(directory / ADAPTER_WEIGHTS, framework="numpy") as tensors:
        stored = set(tensors.keys())
    named = {name_in_base(name) for name in stored}
    # Biases that were trained, embeddings that were saved: PEFT copies them over the base's, so not ours.
    apart = set(config.modules_to_save or ())  # PEFT makes its own copy of those
    copied = {
        name
        for name, _ in base.model.named_parameters()
        if name in named and apart.isdisjoint(name.split("."))
    }
    tokenizer = load_tokenizer(str(directory))
    embedding = base.model.get_input_embeddings().weight
    if len(tokenizer) > len(embedding):  # grown in place
        copied |= {name for name, parameter in base.model.named_parameters() if parameter is embedding}
    tree = base.copy_with(copied)
    grow_to(tree, tokenizer)
    try:
        # A copy: PEFT writes into the configuration that it is given.
        adapted = PeftModel.from_pretrained(
            tree, str(directory), config=copy.deepcopy(config), torch_device=str(base.device)
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(_no_fit(directory, base, " ".join(str(error).split())[:400])) from error
    if said := misfit(adapted, stored, copied):
        raise ModelError(_no_fit(directory, base, said))
    facts = read_facts(directory)
    pad_token_id = facts.get("pad_token_id", tree.config.get_text_config().pad_token_id)
    if pad_token_id is not None:
        set_pad_token(adapted, pad_token_id)
    limit = position_limit(unwrapped(adapted))
    form = saved_form(facts, tokenizer)
    return LoadedModel(adapted.to(base.device).eval(), tokenizer, form, pad_token_id, limit)


def _no_fit(directory: Path, base: SharedWeights, said: str) -> str:
    return (
        f"adapter `{directory}` does not fit its base `{base.name}`: {said}. Put the model that it was "
        "trained on there, or publish the adapter merged (without `--keep-adapter`)."
    )


def _not_apart(config: Any, facts: Mapping[str, Any]) -> str | None:
    """Why an adapter of this configuration cannot lie beside weights that others use, or None."""
    if facts.get("quantization"):
        return "it was trained on weights in 4 or 8 bits, and scores on those"
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _APART:
        return f"{kind} is merged"
    if getattr(config, "init_lora_weights", True) not in _READING_INITS:
        return f"`init_lora_weights` ({config.init_lora_weights!r}) changes the base's weights"
    for name in ("target_parameters", "layer_replication", "alora_invocation_tokens"):
        if getattr(config, name, None):
            return f"`{name}` is set"
    return None


def _stamps(name: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that a base directory is loaded from; of a hub name nothing."""
    found = [Path(name) / "config.json", *sorted(Path(name).glob("*.safetensors"))]
    files = [(file.name, file.stat()) for file in found if file.is_file()]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in files)
