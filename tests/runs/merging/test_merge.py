"""Merge tiny models whole: results load, equal their definition and mergekit, and survive interruptions."""

import json
import os
import shutil
import signal
from pathlib import Path

import peft
import pytest
import tiny_run
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselm.cli.endings import run_command
from fuselm.models.merging import tensor_files
from fuselm.models.merging.methods import merge_tensors
from fuselm.runs.merging.merge import make_merge, plan_merge
from fuselm.runs.merging.recipe import load_recipe
from fuselm.system import manifest
from fuselm.system.progress import Progress


def perturb(folder: Path, out: Path, seed: int, tokens: tuple[str, ...] = ()) -> Path:
    """Save a model whose weights are a little other, and with more tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    if tokens:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
        model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def models(byte_level, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("merged")
    made = {name: perturb(byte_level, folder / name, seed) for seed, name in enumerate("abc")}
    return {"base": str(byte_level)} | {name: str(path) for name, path in made.items()}


def write(folder: Path, recipe: dict) -> Path:
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def merge(folder: Path, recipe: dict, **options) -> Path:
    """Merge in this process, and return the result's folder."""
    plan = plan_merge(load_recipe(write(folder, recipe))[0])
    make_merge(plan, folder / "out", Progress(Console(quiet=True), "merge"), **options)
    return folder / "out"


def read_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    return {
        name: t.float() for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()
    }


def test_every_tensor_is_what_the_method_makes_of_it(models, tmp_path):
    out = merge(
        tmp_path,
        {
            "method": "ties",
            "base": models["base"],
            "models": {
                "one": {"model": models["a"], "weight": 0.6, "density": 0.5},
                "two": {"model": models["b"], "weight": 0.3, "density": 0.8},
            },
            "parameters": {"normalize": False},
        },
    )
    base, a, b = (read_tensors(models[name]) for name in ("base", "a", "b"))
    merged = read_tensors(out)
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        expected = merge_tensors(
            "ties", [a[name], b[name]], base=base[name], weight=[0.6, 0.3], density=[0.5, 0.8], normalize=False
        )
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = tokenizer("Every text", return_tensors="pt")
    assert model.generate(text.input_ids, max_new_tokens=3, do_sample=False).shape[1] == text.input_ids.shape[1] + 3
    assert manifest.read(out)["counts"]["models"] == 3
    assert "| `ties`" not in (out / "README.md").read_text() and "by `ties`" in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # mergekit imports what reads it
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "model_stock", "sce"])
def test_mergekit_writes_the_same_model(models, tmp_path, method):
    run_merge = pytest.importorskip("mergekit.merge").run_merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    weighted = method in ("linear", "task_arithmetic")
    settings = [
        {"weight": [{"filter": "mlp", "value": [0.1, 0.7]}, {"value": 0.4}]},
        {"weight": [0.3, 0.9]},
    ]
    recipe = {
        "merge_method": method,
        "models": [
            {"model": models[name]} | ({"parameters": own} if weighted else {})
            for name, own in zip("ab", settings, strict=True)
        ],
        "parameters": {"select_topk": 0.4} if method == "sce" else {},
        "dtype": "float32",
    }
    if method != "linear":
        recipe["base_model"] = models["base"]
    run_merge(
        MergeConfiguration.model_validate(recipe), str(tmp_path / "theirs"), options=MergeOptions(copy_tokenizer=True)
    )
    ours, theirs = read_tensors(merge(tmp_path, recipe)), read_tensors(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=name)


def test_an_interrupted_merge_resumes_and_ends_in_the_same_bytes(models, tmp_path, monkeypatch):
    recipe = {"method": "linear", "models": [{"model": models[n], "weight": 1} for n in "abc"]}
    (tmp_path / "whole").mkdir()
    whole = merge(tmp_path / "whole", recipe, shard_bytes=20_000)
    assert len(list(whole.glob("*.safetensors"))) > 4
    write_shard, written = tensor_files.write_shard, []

    def fail_at_the_third(path, shard, blocks):
        written.append(shard.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_shard(path, shard, blocks)

    (tmp_path / "cut").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "write_shard", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "cut", recipe, shard_bytes=20_000)
        assert not (tmp_path / "cut/out").exists()
        patched.setattr(
            tensor_files,
            "write_shard",
            lambda path, shard, blocks: (written.append(shard.name), write_shard(path, shard, blocks)),
        )
        cut = merge(tmp_path / "cut", recipe, shard_bytes=20_000)
    assert written.count(written[0]) == 1 and written.count(written[2]) == 2
    names = sorted(
        path.name for path in whole.iterdir() if path.name != "manifest.json" and not path.name.startswith(".")
    )
    assert names == sorted(p.name for p in cut.iterdir() if p.name != "manifest.json" and not p.name.startswith("."))
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)
    AutoModelForCausalLM.from_pretrained(cut)


def test_a_merge_killed_in_the_middle_of_a_shard_ends_in_the_same_bytes(models, tmp_path, monkeypatch):
    recipe = {"method": "ties", "base": models["base"], "models": [{"model": models[n], "weight": 1} for n in "ab"]}
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        folder.mkdir()
    whole = merge(tmp_path / "whole", recipe, shard_bytes=20_000)
    if not (pid := os.fork()):
        torch.set_num_threads(1)
        write_shard, shards = tensor_files.write_shard, []

        def write_and_die(path, shard, blocks):
            def yield_one():
                yield next(blocks)
                os.kill(os.getpid(), signal.SIGKILL)

            shards.append(path)
            return write_shard(path, shard, yield_one() if len(shards) == 3 else blocks)

        monkeypatch.setattr(tensor_files, "write_shard", write_and_die)
        merge(tmp_path / "cut", recipe, shard_bytes=20_000)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = (path for path in (tmp_path / "cut").iterdir() if path.is_dir())
    kept = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    assert len(kept) == 2 and not (tmp_path / "cut/out").exists()
    cut = merge(tmp_path / "cut", recipe, shard_bytes=20_000)
    assert {name: (cut / name).stat().st_ino for name in kept} == kept
    names = [path.name for path in whole.iterdir() if path.name != "manifest.json"]
    assert sorted(names) == sorted(path.name for path in cut.iterdir() if path.name != "manifest.json")
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)


def test_added_tokens_are_united_by_token(byte_level, tmp_path):
    one = perturb(byte_level, tmp_path / "one", 1, ("<|user|>", "<|end|>"))
    two = perturb(byte_level, tmp_path / "two", 2, ("<|end|>", "<|tool|>"))
    out = merge(tmp_path, {"method": "linear", "models": [{"model": str(m), "weight": 1} for m in (one, two)]})
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|end|>", "<|tool|>")}
    assert len(set(ids.values())) == 3 and tokenizer.encode("<|tool|>") == [ids["<|tool|>"]]
    first, second = AutoTokenizer.from_pretrained(one), AutoTokenizer.from_pretrained(two)
    name = "model.embed_tokens.weight"
    merged, a, b = (read_tensors(folder)[name] for folder in (out, one, two))
    torch.testing.assert_close(merged[ids["<|user|>"]], a[first.convert_tokens_to_ids("<|user|>")])
    torch.testing.assert_close(merged[ids["<|tool|>"]], b[second.convert_tokens_to_ids("<|tool|>")])
    both = a[first.convert_tokens_to_ids("<|end|>")] + b[second.convert_tokens_to_ids("<|end|>")]
    torch.testing.assert_close(merged[ids["<|end|>"]], both / 2)
    torch.testing.assert_close(merged[300], (a[300] + b[300]) / 2)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(merged) > ids["<|tool|>"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_lora_adapter_is_merged_as_peft_merges_it(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["a"], dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = {n: t.detach() for n, t in adapted.merge_and_unload().state_dict().items()}
    entry = {"model": f"{models['a']}+{tmp_path / 'adapter'}", "weight": 1}
    merged = read_tensors(merge(tmp_path, {"method": "linear", "models": [entry]}))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_the_type_on_disk_is_the_one_asked_for(models, tmp_path):
    out = merge(
        tmp_path, {"method": "varm", "base": models["base"], "models": [models["a"], models["b"]], "dtype": "bfloat16"}
    )
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_what_does_not_fit_is_named_before_anything_is_written(models, sentence_piece, tmp_path, capsys):
    from fuselm.cli.main import app

    shutil.copytree(models["a"], tmp_path / "wide")
    tensors = load_file(tmp_path / "wide/model.safetensors")
    name = next(n for n in tensors if n.endswith("mlp.up_proj.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name][:5]])
    save_file(tensors, tmp_path / "wide/model.safetensors", {"format": "pt"})
    for other, message in (
        (tmp_path / "wide", f"other shapes of {name} ("),
        (sentence_piece, "architectures llama and gemma3_text: these cannot be merged; fuse them instead"),
    ):
        file = write(
            tmp_path, {"method": "linear", "models": [{"model": str(m), "weight": 1} for m in (models["a"], other)]}
        )
        for arguments in ([str(file), str(tmp_path / "out")], [str(file), "--check"]):
            code = run_command(lambda arguments=arguments: app(["merge", *arguments], standalone_mode=False) or 0)
            assert code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_tokenizers_of_other_words_are_refused(models, tmp_path):
    shutil.copytree(models["a"], tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[400:402]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    recipe = {"method": "linear", "models": [{"model": m, "weight": 1} for m in (models["a"], str(tmp_path / "other"))]}
    with pytest.raises(ValueError, match="their tokenizers differ in 2 tokens besides added ones"):
        merge(tmp_path, recipe)


def test_a_check_says_what_will_come_out(models, tmp_path, capsys):
    from fuselm.cli.main import app

    file = write(tmp_path, {"method": "karcher", "models": [models["a"], models["b"]], "output": str(tmp_path / "out")})
    assert run_command(lambda: app(["merge", str(file), "--check"], standalone_mode=False) or 0) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"karcher of {models['a']}, {models['b']}: ") and " parameters in " in shown
    assert not (tmp_path / "out").exists()
    for said in ("merged into", "nothing to do, it is in"):
        assert run_command(lambda: app(["merge", str(file)], standalone_mode=False) or 0) == 0
        assert f"{said} {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # mergekit imports what reads it
def test_a_method_of_mergekits_alone_is_handed_to_it(models, tmp_path):
    pytest.importorskip("mergekit")
    from fuselm.runs.merging.mergekit import merge_with_mergekit

    recipe = {"method": "arcee_fusion", "base": models["base"], "models": [models["a"]], "dtype": "float32"}
    merge_with_mergekit(load_recipe(write(tmp_path, recipe))[0], tmp_path / "out")
    merged, base, a = (read_tensors(folder) for folder in (tmp_path / "out", models["base"], models["a"]))
    name = "model.layers.0.mlp.up_proj.weight"
    assert ((merged[name] == base[name]) | (merged[name] == a[name])).all() and (merged[name] != base[name]).any()


def test_a_method_that_nobody_knows_is_named_before_models_are_looked_for(tmp_path, capsys):
    from fuselm.cli.main import app

    file = write(tmp_path, {"method": "tie", "models": ["nowhere"]})
    assert run_command(lambda: app(["merge", str(file), "--check"], standalone_mode=False) or 0) == 2
    assert "method: tie is none of linear, slerp" in capsys.readouterr().err


def test_a_soup_is_chosen_on_texts(tmp_path, models, texts):
    """It is no worse on them than any of its models, and is the weighted mean that soup.json describes."""
    tiny_run.write_rows(tmp_path / "dev.jsonl", tiny_run.short(texts, length=67))
    recipe = {
        "method": "soup",
        "models": {name: models[name] for name in "ab"},
        "parameters": {"grid": 2, "steps": 4},
        "texts": str(tmp_path / "dev.jsonl"),
        "output": str(tmp_path / "out"),
    }
    outcome = tiny_run.fuselm("merge", write(tmp_path, recipe))
    assert outcome.code == 0, outcome.err
    soup = json.loads((tmp_path / "out" / "soup.json").read_text())
    scores = {str(tried.get("shares")): tried["bits_per_byte"] for tried in soup["tried"]}
    assert len(soup["tried"]) == 3 + 4 and min(scores.values()) <= min(scores["[1.0, 0.0]"], scores["[0.0, 1.0]"])
    a, b, merged = (load_file(f"{folder}/model.safetensors") for folder in (models["a"], models["b"], tmp_path / "out"))
    for name, tensor in merged.items():
        share, other = soup["shares"][soup["groups"][name]]
        torch.testing.assert_close(tensor, share * a[name] + other * b[name], rtol=1e-5, atol=1e-6)
    assert "nothing to do" in tiny_run.fuselm("merge", tmp_path / "merge.yaml").out
    del recipe["texts"]
    refused = tiny_run.fuselm("merge", write(tmp_path, recipe))
    assert refused.code == 2 and "texts: soup chooses weights on texts; name a file" in refused.err


def test_a_merge_is_diagnosed_layer_by_layer(tmp_path, models):
    recipe = {"method": "sce", "base": models["base"], "models": [models["a"], models["b"], models["a"]]}
    path, page = write(tmp_path, recipe), tmp_path / "apart.html"
    outcome = tiny_run.fuselm("diagnose", path, "--json", "--report", page)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert list(result["layers"]) == ["embeddings", "0", "1", "others"] and len(result["models"]) == 3
    (first, same, last) = result["all"]["pairs"]
    assert same["cosine"] == pytest.approx(1) and same["sign_agreement"] == 1
    assert abs(first["cosine"]) < 0.1 and first["sign_agreement"] == pytest.approx(0.5, abs=0.05)
    assert first == {**last, "models": first["models"]}
    base, moved = (load_file(f"{models[name]}/model.safetensors") for name in ("base", "a"))
    layer = [name for name in base if ".layers.1." in name]
    length = sum((moved[n] - base[n]).square().sum() for n in layer) / sum(base[n].square().sum() for n in layer)
    assert result["layers"]["1"]["relative_lengths"][result["models"][0]] == pytest.approx(
        float(length) ** 0.5, rel=1e-5
    )
    assert "How far models are apart" in page.read_text() and "<svg" in page.read_text()
    shown = tiny_run.fuselm("diagnose", path)
    assert shown.code == 0 and "1, 2 cosine" in shown.out and "others" in shown.out
    assert "The mean cosine of their differences is 0.3" in shown.out and "agree in part" in page.read_text()
