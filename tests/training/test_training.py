"""Test target_training.py on a tiny model: documents, lambda, checkpoints, the product, kills and resuming."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import SETTINGS, documents, fused, python_path, read_losses, target, train, vocabulary_of, weights  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from fuselm.documents.passages import pack_documents
from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import locate_model
from fuselm.results import scoring
from fuselm.training import adapters, target_training, trainer
from fuselm.training.batches import Collator
from fuselm.training.objective import fusion_loss
from fuselm.training.order import order_documents, shuffle_passes
from fuselm.training.target_training import choose_dev_steps, find_last_checkpoint
from fuselm.training.trainable import compute_loss_in_forward
from fuselm.training.trainer import TERMS


@settings(deadline=None)
@given(st.integers(0, 101), st.integers(1, 13))
def test_dev_steps_are_spread_evenly_and_end_with_the_last_step(steps, evaluations):
    chosen = choose_dev_steps(steps, evaluations)
    assert len(chosen) == min(steps, evaluations) or steps < evaluations
    assert all(0 < step <= steps for step in chosen)
    if steps:
        assert max(chosen) == steps
        gaps = np.diff([0, *sorted(chosen)])
        assert gaps.max() - gaps.min() <= 1 or steps < evaluations


def test_a_checkpoint_that_was_cut_off_is_not_the_last(tmp_path):
    assert find_last_checkpoint(tmp_path) is None
    whole = json.dumps({"global_step": 3})
    for step, state in ((3, whole), (11, whole), (13, whole[:-5]), (17, ""), (19, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(target, documents, fused, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "fused"
    train(out, target, documents, fused)
    return out


def test_lambda_1_trains_bit_for_bit_like_clm(tmp_path, target, documents, fused):
    train(tmp_path / "fused", target, documents, fused, lambda_clm=1.0)
    train(tmp_path / "clm", target, documents, None, lambda_clm=1.0)
    assert_same_weights(tmp_path / "fused", tmp_path / "clm")
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("fused", "clm")]
    assert histories[0]["dev"] == histories[1]["dev"]


def test_training_twice_gives_the_same_model_and_losses(tmp_path, trained, target, documents, fused):
    train(tmp_path / "again", target, documents, fused)
    model = "model/model.safetensors"
    assert (tmp_path / "again" / model).read_bytes() == (trained / model).read_bytes()
    assert read_losses(tmp_path / "again") == read_losses(trained)


def test_the_history_says_how_fast_each_step_was(trained):
    history = json.loads((trained / "history.json").read_text())
    assert [row["step"] for row in history["speed"]] == [row["step"] for row in history["log"]]
    for row in history["speed"]:
        assert row["tokens_per_second"] > 0 and row["memory_bytes"] > 1 << 20
        assert 0 < row["data_wait"] < 1 and row["seconds"] > 0


def test_processes_that_read_ahead_change_nothing(tmp_path, trained, target, documents, fused):
    train(tmp_path, target, documents, fused, loader_workers=2)
    assert_same_weights(tmp_path, trained)
    assert read_losses(tmp_path) == read_losses(trained)


def test_a_long_training_logs_the_means_of_several_steps(tmp_path, trained, target, documents, fused, monkeypatch):
    steps = json.loads((trained / "history.json").read_text())["log"]
    monkeypatch.setattr(target_training, "LOGGED", len(steps) // 3)
    train(tmp_path, target, documents, fused)
    history, between = json.loads((tmp_path / "history.json").read_text()), -(-len(steps) // (len(steps) // 3))
    assert [row["step"] for row in history["log"]] == [*range(between, len(steps), between), len(steps)]
    last = 0
    for row, speed in zip(history["log"], history["speed"], strict=True):
        for name in ("loss", *TERMS):
            own = [of[name] for of in steps[last : row["step"]]]
            assert row[name] == pytest.approx(sum(own) / len(own), rel=1e-4)
        assert speed["tokens_per_second"] > 0
        last = row["step"]


def test_fused_rows_change_what_is_learned(tmp_path, trained, target, documents):
    train(tmp_path / "clm", target, documents, None, lambda_clm=1.0)
    a, b = weights(trained), weights(tmp_path / "clm")
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_loss_is_the_mean_over_the_tokens_of_the_first_documents(tmp_path, target, documents, accumulation):
    train(tmp_path, target, documents, None, lambda_clm=1.0, gradient_accumulation=accumulation)
    vocabulary, chosen = vocabulary_of(target), [d for d in documents if d.split == "train"]
    lengths = vocabulary.count_tokens([d.text for d in chosen])
    order = order_documents(lengths, passes=2, batch=3, seed=0).tolist()[: 3 * accumulation]
    model = load_model(target, dtype="float32")
    scores = scoring.score_documents(
        model, forward.find_output_layer(model), vocabulary, target.context_token, [chosen[i] for i in order]
    )
    nats = sum(s.bits for s in scores) * math.log(2) / sum(lengths[i] for i in order)
    first = json.loads((tmp_path / "history.json").read_text())["log"][0]
    assert first["loss"] == pytest.approx(nats, rel=1e-5) and first["clm_loss"] == pytest.approx(nats, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms(trained):
    log = json.loads((trained / "history.json").read_text())["log"]
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    for row in log:
        assert row["loss"] == pytest.approx(0.5 * row["clm_loss"] + 0.5 * row["fusion_loss"], rel=1e-5)
        assert row["lambda"] == 0.5 and row["fusion_loss"] > 0


def test_lambda_decays_linearly_from_the_first_step_to_the_last(tmp_path, target, documents, fused):
    train(tmp_path, target, documents, fused, lambda_clm=0.9, lambda_final=0.1)
    log = json.loads((tmp_path / "history.json").read_text())["log"]
    assert [row["lambda"] for row in log] == pytest.approx(np.linspace(0.9, 0.1, len(log)).tolist())
    for row in log:
        expected = row["lambda"] * row["clm_loss"] + (1 - row["lambda"]) * row["fusion_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("confidence", ["expected", "gold"])
def test_confidence_leaves_less_to_the_divergence(tmp_path, trained, target, documents, fused, confidence):
    train(tmp_path, target, documents, fused, confidence=confidence)
    first, plain = ({n: logged(o, n)[0] for n in ("loss", *TERMS)} for o in (tmp_path, trained))
    assert {n: first[n] for n in TERMS} == {n: plain[n] for n in TERMS} and first["loss"] != plain["loss"]


def test_confidence_changes_nothing_where_the_text_alone_counts(tmp_path, target, documents, fused):
    for out, confidence in (("a", "none"), ("b", "gold")):
        train(tmp_path / out, target, documents, fused, lambda_clm=1.0, confidence=confidence)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def logged(out: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in json.loads((out / "history.json").read_text())["log"]]


@pytest.mark.parametrize("model", ["byte_level", "sentence_piece", "word_piece"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_documents_apart(request, model, attention):
    folder = request.getfixturevalue(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
    compute_loss_in_forward(loaded, forward.find_output_layer(loaded.eval()))
    items = [{"tokens": np.arange(n, 2 * n) % 200} for n in (5, 3, 11)]

    def loss_and_gradient(packed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch = Collator(7, packed=packed)([items])
        labels = batch.pop("labels")
        known = labels != -100

        def then(hidden, layer):
            return {"loss": fusion_loss(hidden, layer, labels[known], None, 1.0, count=19.0).total}

        loss = loaded(**batch, token_mask=known, loss_fn=then)["loss"]
        return loss, list(torch.autograd.grad(loss, list(loaded.parameters())))

    (packed, packed_gradients), (padded, padded_gradients) = loss_and_gradient(True), loss_and_gradient(False)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    for a, b in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_documents_are_packed_up_to_so_many_tokens_a_step(tmp_path, target, documents, fused):
    counts = train(tmp_path, target, documents, fused, batch_documents=None, pack_tokens=211, passes=1)
    chosen = [d for d in documents if d.split == "train"]
    lengths = vocabulary_of(target).count_tokens([d.text for d in chosen])
    expected = pack_documents(lengths, shuffle_passes(lengths, passes=1, seed=0).tolist(), 211)
    assert counts["steps"] == len(expected) < len(chosen)
    assert all(math.isfinite(loss) for loss in logged(tmp_path))


def test_a_model_that_mixes_the_documents_of_a_row_is_not_packed(byte_level):
    assert forward.keeps_documents_apart(AutoModelForCausalLM.from_pretrained(byte_level))
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not forward.keeps_documents_apart(MambaForCausalLM(config).eval())


def test_gradient_checkpointing_changes_no_loss(tmp_path, trained, target, documents, fused):
    train(tmp_path, target, documents, fused, gradient_checkpointing=True)
    assert logged(tmp_path) == pytest.approx(logged(trained), rel=1e-5)


def test_patience_ends_training_that_gets_no_better(tmp_path, target, documents):
    settings = {"lambda_clm": 1.0, "passes": 9, "learning_rate": 3e-1, "patience": 2}
    counts = train(tmp_path, target, documents, None, **settings)
    dev = [row["average"] for row in json.loads((tmp_path / "history.json").read_text())["dev"]][1:]
    assert len(dev) == dev.index(min(dev)) + 3 < 9 * SETTINGS.evaluations_per_pass
    assert counts["dev_bits_per_byte"] == min(dev)
    lengths = vocabulary_of(target).count_tokens([d.text for d in documents if d.split == "train"])
    order = order_documents(lengths, passes=9, batch=3, seed=0).tolist()
    assert counts["tokens"] == sum(lengths[i] for i in order[: 3 * counts["steps"]]) < 9 * sum(lengths)


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.0), ("constant", 1.0), ("cosine", 0.0)])
def test_the_learning_rate_follows_its_schedule_after_the_warm_up(tmp_path, target, documents, schedule, last):
    train(tmp_path, target, documents, None, lambda_clm=1.0, lr_schedule=schedule, passes=1, warmup=0.4)
    rates = [rate / SETTINGS.learning_rate for rate in logged(tmp_path, "learning_rate")]
    assert rates[0] == 0 < rates[1] and max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(last, abs=0.4)


def test_a_single_step_is_no_warm_up(tmp_path, target, documents):
    counts = train(tmp_path, target, documents, None, lambda_clm=1.0, passes=1, batch_documents=97)
    assert counts["steps"] == 1 and logged(tmp_path, "learning_rate") == [SETTINGS.learning_rate]
    before, after = load_file(target.folder / "model.safetensors"), weights(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "divergence", [{"divergence": "jsd"}, {"divergence": "reverse_kl"}, {"temperature": 2.0}, {"tail": "renormalise"}]
)
def test_every_divergence_trains(tmp_path, trained, target, documents, fused, divergence):
    train(tmp_path, target, documents, fused, passes=1, **divergence)
    assert logged(tmp_path, "clm_loss")[0] == pytest.approx(logged(trained, "clm_loss")[0], rel=1e-5)
    assert logged(tmp_path, "fusion_loss")[0] != pytest.approx(logged(trained, "fusion_loss")[0], rel=1e-3)


OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft


@OLD_NAME
def test_adapters_alone_are_trained_and_then_merged(tmp_path, target, documents, fused):
    pytest.importorskip("peft")
    counts = train(tmp_path, target, documents, fused, lora_rank=3, lora_dropout=0.1, learning_rate=3e-2)
    before, after = load_file(target.folder / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.split(".")[-2].endswith("_proj") for name in changed)
    assert all(int(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-4)) <= 3 for n in changed)
    product = locate_model(str(tmp_path / "model"))
    loaded = load_model(product, dtype="float32")
    chosen = [d for d in documents if d.split == "dev"]
    scores = scoring.score_documents(
        loaded, forward.find_output_layer(loaded), vocabulary_of(product), product.context_token, chosen
    )
    assert scoring.compute_bits_per_byte(scores)["average"] == pytest.approx(counts["dev_bits_per_byte"], rel=1e-5)


@OLD_NAME
def test_adapters_begin_with_the_seed(tmp_path, target, documents, fused):
    pytest.importorskip("peft")
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.rand(7)  # whatever was drawn before
        train(tmp_path / name, target, documents, fused, lora_rank=3, passes=1, seed=seed)
    assert_same_weights(tmp_path / "one", tmp_path / "again")
    assert logged(tmp_path / "one") != logged(tmp_path / "other")


@OLD_NAME
def test_a_target_in_4_bits_learns_adapters_that_are_merged_into_the_whole_one(tmp_path, target, documents, fused):
    pytest.importorskip("bitsandbytes")
    shutil.copytree(target.folder, tmp_path / "wide")
    config = AutoConfig.from_pretrained(target.folder, hidden_size=64, intermediate_size=128, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")  # as wide as a block of NF4 on a CPU
    target = locate_model(str(tmp_path / "wide"))
    train(tmp_path, target, documents, fused, passes=1, lora_rank=3, quantize="nf4", precision="bf16")
    before, after = load_file(target.folder / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(int(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-4)) <= 3 for n in changed)


def test_modules_that_the_target_lacks_are_refused(tmp_path, target, documents):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"^train.lora_modules: .*; name linear layers of the target$"):
        train(tmp_path, target, documents, None, lora_rank=3, lora_modules=["nothing"])


@OLD_NAME
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # of peft
@pytest.mark.parametrize(("tied", "module"), [(False, "lm_head"), (True, "embed_tokens")])
def test_an_output_layer_with_adapters_is_refused(byte_level, tied, module):
    """Refuse them, because the loss reads the layer's own weights, so its adapters would learn nothing."""
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(byte_level, tie_word_embeddings=tied))
    with pytest.raises(ValueError, match=r"^train.lora_modules: they name the output layer, .*; leave them out$"):
        adapters.add_adapters(model, rank=3, alpha=6.0, dropout=0.0, modules=["q_proj", module])


@OLD_NAME
def test_embeddings_that_are_not_the_output_layer_may_have_adapters(byte_level):
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(byte_level)
    adapters.add_adapters(model, rank=3, alpha=6.0, dropout=0.0, modules=["embed_tokens"])


def test_weights_and_biases_has_each_term_of_the_loss(tmp_path, target, documents, fused, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(tmp_path / "out", target, documents, fused, passes=1, trackers=["wandb"])
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(name in recorded.read_bytes() for name in (b"train/clm_loss", b"train/fusion_loss", b"train/lambda"))
    assert not (tmp_path / "out" / "logs").exists()


def test_bf16_trains_float32_weights_with_bfloat16_products(tmp_path, target, documents, fused, monkeypatch):
    products, linear = [], torch.nn.functional.linear

    def watched(*args):
        result = linear(*args)
        if torch.is_autocast_enabled("cpu"):  # a model that is only tried or scored again is not meant
            products.append(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    counts = train(tmp_path, target, documents, fused, precision="bf16")
    assert set(products) == {torch.bfloat16} and len(products) > 100
    log = json.loads((tmp_path / "history.json").read_text())["log"]
    assert all(math.isfinite(row["loss"]) for row in log) and counts["steps"] == len(log)
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}  # the target's


def test_the_best_checkpoint_on_the_development_split_is_kept(tmp_path, target, documents):
    counts = train(tmp_path, target, documents, None, lambda_clm=1.0, passes=9, learning_rate=3e-2)
    dev = json.loads((tmp_path / "history.json").read_text())["dev"]
    best = min(dev[1:], key=lambda row: row["average"])
    assert counts["best_step"] == best["step"] < counts["steps"]  # so that the last one is not the best
    assert counts["dev_bits_per_byte"] == best["average"]
    model = locate_model(str(tmp_path / "model"))
    loaded = load_model(model, dtype="float32")
    chosen = [d for d in documents if d.split == "dev"]
    scores = scoring.score_documents(
        loaded, forward.find_output_layer(loaded), vocabulary_of(model), model.context_token, chosen
    )
    assert scoring.compute_bits_per_byte(scores)["average"] == pytest.approx(best["average"], rel=1e-6)


def test_a_rate_that_is_too_high_is_named(tmp_path, target, documents):
    with pytest.raises(
        ValueError, match=r"^train, step \d+: document .* gives NaN; lower train.learning_rate \(it is 1e\+30"
    ):
        train(tmp_path, target, documents, None, lambda_clm=1.0, learning_rate=1e30)


def test_a_process_trains_on_one_of_several_gpus(tmp_path, trained, target, documents, fused, monkeypatch):
    """Check the case in which transformers alone would split each batch among GPUs."""
    arguments = target_training._build_arguments

    def of_two_gpus(*given, **named):
        made = arguments(*given, **named)
        assert made.n_gpu <= 1
        made._n_gpu = 2
        return made

    monkeypatch.setattr(target_training, "_build_arguments", of_two_gpus)
    train(tmp_path, target, documents, fused)
    assert_same_weights(tmp_path, trained)


def test_a_training_of_an_earlier_version_does_not_resume_with_other_processes(
    tmp_path, target, documents, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ProgressReport, "on_save", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, target, documents, None)
    (tmp_path / ".steps.json").unlink()
    steps = json.loads((find_last_checkpoint(tmp_path / "checkpoints") / "trainer_state.json").read_text())["max_steps"]
    monkeypatch.setattr(target_training.processes, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"with another number of processes, for which this is {steps} steps and "):
        train(tmp_path, target, documents, None)


def cut_at_its_last_checkpoint(out: Path, monkeypatch, *given, **options) -> dict:
    """Interrupt a training in `out` once it has all its checkpoints; return what another counts uninterrupted."""
    whole = train(out.with_name("whole"), *given, **options)
    left = itertools.count(2 - len(json.loads((out.with_name("whole") / "history.json").read_text())["dev"]))

    def stop(*_, **__):
        if next(left) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ProgressReport, "on_save", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(out, *given, **options)
    return whole


WORSENING = {"lambda_clm": 1.0, "passes": 9, "learning_rate": 0.3, "evaluations_per_pass": 1}


def test_a_training_that_patience_ended_stays_ended_when_resumed(tmp_path, target, documents, monkeypatch):
    options = WORSENING | {"patience": 2}
    whole = cut_at_its_last_checkpoint(tmp_path / "cut", monkeypatch, target, documents, None, **options)
    counts = train(tmp_path / "cut", target, documents, None, **options)
    assert counts == whole | {"resumed_at_step": whole["steps"]} and whole["steps"] < whole["planned_steps"]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_the_best_checkpoint_is_found_after_the_folder_has_moved(tmp_path, target, documents, monkeypatch):
    whole = cut_at_its_last_checkpoint(tmp_path / "cut", monkeypatch, target, documents, None, **WORSENING)
    (tmp_path / "cut").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "damaged")
    assert train(tmp_path / "moved", target, documents, None, **WORSENING)["best_step"] < whole["steps"]
    assert_same_weights(tmp_path / "moved", tmp_path / "whole")
    (tmp_path / "damaged/checkpoints" / f"checkpoint-{whole['best_step']}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-{whole['best_step']}: the best checkpoint so far is gone or "):
        train(tmp_path / "damaged", target, documents, None, **WORSENING)


def test_a_training_interrupted_while_its_checkpoints_are_dropped_has_ended(tmp_path, target, documents, monkeypatch):
    drop = shutil.rmtree

    def stop(folder, *given, **options):
        if Path(folder).name == "checkpoints":
            drop(min(folder.iterdir(), key=lambda p: int(p.name.split("-")[1])))  # the best
            raise KeyboardInterrupt
        drop(folder, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, target, documents, None, **WORSENING)
    before = weights(tmp_path)
    counts = train(tmp_path, target, documents, None, **WORSENING)
    assert counts["best_step"] < counts["steps"] and not (tmp_path / "checkpoints").exists()
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path).items())


def test_a_resumed_training_logs_every_step_once(tmp_path, target, documents, fused, monkeypatch):
    def stop(self, args, state, control, **_):
        if len([row for row in state.log_history if "eval_domains" in row]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ProgressReport, "on_save", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, target, documents, fused)
    assert train(tmp_path, target, documents, fused)["resumed_at_step"] > 0
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    history = json.loads((tmp_path / "history.json").read_text())
    assert [e.step for e in events.Scalars("train/loss")] == [row["step"] for row in history["log"]]
    assert [e.step for e in events.Scalars("eval/bits_per_byte")] == [row["step"] for row in history["dev"]][1:]


def test_a_target_of_another_precision_is_kept_in_float32(tmp_path, target, documents):
    folder = tmp_path / "double"
    shutil.copytree(target.folder, folder)
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | {"dtype": "float64"}))
    train(tmp_path / "out", locate_model(str(folder)), documents[:6], None, passes=1, evaluations_per_pass=1)
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.float32}


@pytest.fixture(scope="module")
def averaged(target, documents, fused, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "fused"
    train(out, target, documents, fused, average=0.4)  # of a pass: before the first evaluation
    return out


def test_the_mean_of_the_weights_is_scored_and_kept_and_changes_no_step(averaged, trained, target, documents):
    histories = [json.loads((out / "history.json").read_text()) for out in (averaged, trained)]
    assert histories[0]["log"] == histories[1]["log"]
    scores = [[row["average"] for row in history["dev"]] for history in histories]
    assert scores[0][0] == scores[1][0] and all(a != b for a, b in zip(*(s[1:] for s in scores), strict=True))
    model = load_model(locate_model(str(averaged / "model")), dtype="float32")
    chosen = [d for d in documents if d.split == "dev"]
    kept = scoring.score_documents(
        model, forward.find_output_layer(model), vocabulary_of(target), target.context_token, chosen
    )
    assert scoring.compute_bits_per_byte(kept)["average"] == pytest.approx(min(scores[0][1:]), rel=1e-6)


def test_the_history_begins_with_the_untrained_target(trained, target, documents):
    dev = json.loads((trained / "history.json").read_text())["dev"]
    model = load_model(target, dtype="float32")
    chosen = [d for d in documents if d.split == "dev"]
    scores = scoring.score_documents(
        model, forward.find_output_layer(model), vocabulary_of(target), target.context_token, chosen
    )
    assert dev[0].pop("step") == 0 and dev[0] == pytest.approx(scoring.compute_bits_per_byte(scores), rel=1e-6)
    assert len(dev) == 1 + SETTINGS.passes * SETTINGS.evaluations_per_pass


def test_the_product_is_an_ordinary_folder_with_the_targets_tokenizer(trained, target, byte_level):
    loaded = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert loaded.dtype == AutoModelForCausalLM.from_pretrained(byte_level).dtype
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    ids = tokenizer("one model", return_tensors="pt")
    generated = loaded.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == ids["input_ids"].shape[1] + 3
    for path in byte_level.iterdir():
        if path.name.startswith("tokenizer") or path.name == "special_tokens_map.json":
            assert (trained / "model" / path.name).read_bytes() == path.read_bytes()
    assert locate_model(str(trained / "model")).tokenizer_fingerprint == target.tokenizer_fingerprint
    assert not (trained / "checkpoints").exists()


def test_tensorboard_has_each_term_of_the_loss(trained):
    events = EventAccumulator(str(trained / "logs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/clm_loss", "train/fusion_loss", "train/lambda", "eval/bits_per_byte"} <= set(tags)
    log = json.loads((trained / "history.json").read_text())["log"]
    for name in ("clm_loss", "fusion_loss"):
        shown = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in log]


def test_fused_rows_of_other_tokens_are_refused(tmp_path, target, documents, fused):
    others = [dataclasses.replace(d, text=d.text.upper()) for d in documents]
    with pytest.raises(ValueError, match=r"document \d+: other tokens than the target's; fuse again"):
        train(tmp_path, target, others, fused)


SCRIPT = """
import pickle, sys, torch
from pathlib import Path
torch.set_num_threads(int(sys.argv[1]))
import trainings
arguments, settings = pickle.loads(Path(sys.argv[2]).read_bytes())
trainings.train(*arguments, **settings)
"""


@pytest.fixture
def start_training(tmp_path, target, documents, fused):
    """Start a training in a process that may be killed."""
    pickled = tmp_path / "arguments"

    def start(**settings) -> subprocess.Popen:
        pickled.write_bytes(pickle.dumps(((tmp_path / "cut", target, documents, fused), settings)))
        environment = os.environ | {"PYTHONPATH": python_path()}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(torch.get_num_threads()), str(pickled)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    return start


@pytest.mark.parametrize("average", [False, 0.4])
def test_killed_training_resumes_from_the_last_whole_checkpoint_and_ends_the_same(
    tmp_path, request, target, documents, fused, start_training, average
):
    trained = request.getfixturevalue("averaged" if average else "trained")
    process, out = start_training(average=average), tmp_path / "cut"
    while process.poll() is None and find_last_checkpoint(out / "checkpoints") is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = find_last_checkpoint(out / "checkpoints")
    assert checkpoint is not None and not (out / "model").exists()
    step = int(checkpoint.name.split("-")[1])
    dev = json.loads((trained / "history.json").read_text())["dev"]
    following = next(row["step"] for row in dev if row["step"] > step)
    cut_off = checkpoint.with_name(f"checkpoint-{following}")
    shutil.copytree(checkpoint, cut_off, dirs_exist_ok=True)
    (cut_off / "trainer_state.json").write_bytes((checkpoint / "trainer_state.json").read_bytes()[:-11])
    counts = train(out, target, documents, fused, average=average)
    assert counts["resumed_at_step"] == step > 0
    assert (out / "model/model.safetensors").read_bytes() == (trained / "model/model.safetensors").read_bytes()
    assert read_losses(out) == read_losses(trained)
