"""As roll/models/model_providers.py of alibaba/ROLL at 8eb27cc2."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer


def default_tokenizer_provider(model_args: Any) -> Any:
    return AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
