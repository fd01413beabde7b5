"""Capture by a stand-in for vLLM, as documented: the store is the model's own, and odd answers are refused."""

import importlib.machinery
import math
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from captures import documents, source_of  # noqa: F401
from tiny_run import QUIET
from transformers import AutoModelForCausalLM

from fuselm.models.locating import locate_model
from fuselm.runs import config
from fuselm.sources import capture, vllm_engine
from fuselm.stores.retention import Policy
from fuselm.stores.store import Store
from fuselm.system import manifest
from fuselm.system.manifest import Recipe

HOW = {"policy": Policy(policy="threshold", threshold=0.01, top_k=13), "prefix_tokens": 41, "batch_tokens": 211}


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Answer:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None]


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    prompt_logprobs: int
    detokenize: bool
    ignore_eos: bool


def write_tokens_prompt(*, prompt_token_ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    """Answer as vLLM's does: nothing for the first token, then the most probable entries and the token's own."""

    def __init__(self, *, model: str, skip_tokenizer_init: bool, max_model_len: int, max_logprobs: int, **options):
        assert skip_tokenizer_init and not options.pop("enable_prefix_caching")
        assert options.keys() == {"dtype", "logprobs_mode", "tensor_parallel_size", "seed"}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.longest, self.most = max_model_len, max_logprobs

    def generate(self, prompts, asked: SamplingParams, *, use_tqdm: bool) -> list[Answer]:
        assert asked.temperature == 1.0 and asked.prompt_logprobs <= self.most and not use_tqdm
        return [self.answer(prompt["prompt_token_ids"], asked.prompt_logprobs) for prompt in prompts]

    def answer(self, ids: list[int], count: int) -> Answer:
        assert len(ids) < self.longest
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows: list[dict[int, Logprob] | None] = [None]
        for token, row in zip(ids[1:], logprobs, strict=False):
            found = {token: Logprob(float(row[token]))}
            top = row.topk(count)
            rows.append(found | {int(i): Logprob(float(p)) for i, p in zip(top.indices, top.values, strict=True)})
        return Answer(prompt_token_ids=ids, prompt_logprobs=rows)


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, write_tokens_prompt
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "TOKENS_AT_A_TIME", 499)
    return module


def test_the_store_is_that_of_the_model(tmp_path, byte_level, documents, stand_in):
    source, model = source_of(byte_level), locate_model(str(byte_level))

    def build_here(out):
        return capture.capture_from_model(source, documents, out, **HOW, progress=QUIET)

    def build_by_vllm(out):
        shown = {"dtype": "float32", "progress": QUIET}
        return vllm_engine.capture_with_vllm(model, source.vocabulary, documents, out, **HOW, **shown)

    for name, build in (("here", build_here), ("vllm", build_by_vllm)):
        manifest.build_once(tmp_path / name, Recipe(stage="capture"), build)
    here, found = (Store(tmp_path / name, vocabulary_size=model.output_size) for name in ("here", "vllm"))
    assert found.documents == here.documents and len(found) == len(documents)
    differing = rows = 0
    for own, expected in zip(found, here, strict=True):
        assert np.array_equal(own.tokens, expected.tokens) and np.array_equal(own.starts, expected.starts)
        assert np.allclose(own.distributions.gold, expected.distributions.gold, atol=2e-3)
        assert np.allclose(own.distributions.tail, expected.distributions.tail, atol=2e-2)
        rows += len(own.tokens)
        differing += sum(
            not np.array_equal(own.distributions.row(i)[0], expected.distributions.row(i)[0])
            for i in range(len(own.tokens))
        )
    assert differing < 0.02 * rows  # entries that are as probable as the threshold, or as each other


def make_row(*pairs: tuple[int, float]) -> dict[int, Logprob]:
    return {token: Logprob(math.log(p)) for token, p in pairs}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([None], "vLLM gives 1 rows for a prompt of 2 tokens"),
        ([None, None], "token 0: vLLM gives no log-probability of it"),
        ([None, make_row((4, 0.5))], "token 0: vLLM gives no log-probability of it"),
        ([None, make_row((3, 0.7), (4, 0.7))], "token 0: .*1.4"),
        ([None, make_row((3, 0.7), (99, 0.1))], "token 0: id 99 is outside the vocabulary of 11"),
    ],
)
def test_what_no_softmax_gives_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        vllm_engine.read_rows(answer, [3], [0], 11, 2)


def test_nan_is_no_distribution():
    assert vllm_engine.read_rows([None, {3: Logprob(math.nan), 4: Logprob(math.nan)}], [3], [0], 11, 2) is None


def test_policies_that_need_whole_distributions_are_refused():
    with pytest.raises(ValueError, match=r"set capture\.policy to threshold or top_k"):
        config.CaptureOptions(engine="vllm")
    assert config.CaptureOptions(engine="vllm", policy="top_k").recipe == config.CaptureOptions(policy="top_k").recipe


def test_a_missing_vllm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is not installed; pip install 'fuselm\[vllm\]'"):
        vllm_engine.check_installed()
