"""Test checkpoints.py, config_claims.py and tokenizer_files.py: all that is loaded is fingerprinted and checked."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import fuselm
from fuselm.models import forward, tokenizer_files
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import locate_model

ROWS = 641
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 67,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pristine(byte_level, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    for path in byte_level.glob("tokenizer*.json"):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "llama"))


def change(path: Path, **changes) -> None:
    """Set keys; a change to `...` takes the key away."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not ...}))


def refusal(folder: Path) -> str:
    """Return the one line that refuses the folder, and require that it takes seconds."""
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_model(locate_model(str(folder)))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))
    assert time.monotonic() - began < 60  # not a measurement: a million layers take an hour
    return str(caught.value)


# ---- what is read is what is fingerprinted

TRACE = """
import json, os, sys
from pathlib import Path
import safetensors, safetensors.torch, transformers.core_model_loading, transformers.modeling_utils
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import Model, locate_model
from fuselm.models import tokenizer_files
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.append(os.path.realpath(arguments[0]))
sys.addaudithook(hook)
def watched(function):  # opens in Rust, which no hook sees
    def call(path, *arguments, **options):
        hook("open", (str(path),))
        return function(path, *arguments, **options)
    return call
for module in list(sys.modules.values()):
    if getattr(module, "safe_open", None) is safetensors.safe_open and module is not safetensors:
        module.safe_open = watched(safetensors.safe_open)
class Tokenizer:
    from_file = staticmethod(watched(tokenizer_files.Tokenizer.from_file))
tokenizer_files.Tokenizer = Tokenizer
for folder in map(os.path.realpath, sys.argv[1:]):
    opened.clear()
    load_model(Model(name="m", folder=Path(folder), fingerprint="", tokenizer_fingerprint="",
        output_size=641, context_length=67, context_token=0, parameters_bytes=1))
    load_tokenizer(folder)
    print(json.dumps(sorted({os.path.relpath(path, folder) for path in opened if path.startswith(folder + "/")})))
"""
IRRELEVANT = {  # read, and proved below to change nothing
    "generation_config.json",
    "model.safetensors.index.json",
    "chat_template.jinja",
}


@pytest.fixture(scope="module")
def read(pristine, tmp_path_factory) -> dict[Path, set[str]]:
    """Return the files that are opened while model and tokenizer are loaded, for folders of every kind."""
    folders = {
        kind: Path(shutil.copytree(pristine, tmp_path_factory.mktemp("read") / kind))
        for kind in ("whole", "sharded", "named", "pickled", "older")
    }
    for folder in folders.values():
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "quantize_config.json"):
            (folder / name).write_text("{}")
    shard(folders["sharded"])
    shutil.copy(folders["named"] / "model.safetensors", folders["named"] / "other.safetensors")
    change(folders["named"] / "config.json", transformers_weights="other.safetensors")
    torch.save(load_file(folders["pickled"] / "model.safetensors"), folders["pickled"] / "pytorch_model.bin")
    (folders["pickled"] / "model.safetensors").unlink()
    Tokenizer.from_file(str(folders["older"] / "tokenizer.json")).model.save(str(folders["older"]))
    (folders["older"] / "tokenizer.json").unlink()
    change(folders["older"] / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    environment = os.environ | {"PYTHONPATH": str(Path(fuselm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", TRACE, *map(str, folders.values())],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [set(json.loads(line)) for line in ended.stdout.splitlines()]
    return dict(zip(folders.values(), lines, strict=True))


def shard(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size="20KB")


def fingerprints_of(folder: Path) -> tuple[str, str]:
    model = locate_model(str(folder))
    return model.fingerprint, model.tokenizer_fingerprint


def test_every_file_that_is_opened_is_in_the_fingerprint(read):
    for folder, names in read.items():
        assert "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names)
        before = fingerprints_of(folder)
        for name in sorted(names - IRRELEVANT):
            path, content = folder / name, (folder / name).read_bytes()
            if path.suffix == ".safetensors":
                save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
            else:
                path.write_bytes(content + b"\n")
            assert fingerprints_of(folder) != before, f"{name} is read and not fingerprinted"
            path.write_bytes(content)
    every = set().union(*read.values())
    assert {"other.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"} <= every


@pytest.mark.parametrize("kind", ["generation", "index"])
def test_files_that_are_read_and_not_fingerprinted_change_nothing(kind, folder):
    ids = torch.tensor([[0, 5, 3, 7]])
    if kind == "index":
        shard(folder)
    with torch.inference_mode():
        before = load_model(locate_model(str(folder)))(ids).logits
        if kind == "index":
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            names = list(index["weight_map"])
            files = list(index["weight_map"].values())
            index["weight_map"] = dict(zip(names, files[1:] + files[:1], strict=True))
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            settings = {"temperature": 7.0, "do_sample": True, "bos_token_id": 9, "eos_token_id": 11, "max_length": 3}
            (folder / "generation_config.json").write_text(json.dumps(settings))
        after = load_model(locate_model(str(folder)))(ids).logits
    assert torch.equal(before, after)


def test_a_chat_template_changes_no_tokens(folder):
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    before = load_tokenizer(folder).to_str()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).to_str() == before


def test_an_adapter_left_behind_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter lies beside whole weights (adapter_config.json)" in refusal(folder)


def test_weights_by_another_name_are_the_models(folder, tmp_path):
    usual = locate_model(str(folder))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = {name: weight + 1 for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, other / "named.safetensors", metadata={"format": "pt"})
    change(other / "config.json", transformers_weights="named.safetensors")
    model = locate_model(str(other))
    assert model.fingerprint != usual.fingerprint
    loaded = load_model(model).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    (other / "model.safetensors").unlink()
    assert locate_model(str(other)).fingerprint == model.fingerprint


@pytest.mark.parametrize("name", ["../llama/model.safetensors", "/etc/passwd.safetensors", "a\0.safetensors"])
def test_weights_outside_the_folder_are_refused(name, folder):
    change(folder / "config.json", transformers_weights=name)
    assert "names weights outside this folder" in refusal(folder)
    change(folder / "config.json", transformers_weights=...)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "names weights outside this folder" in refusal(folder)


# ---- what is claimed is compared


@pytest.mark.parametrize("value", [10**9, 10**30, 1 << 40])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_sizes_that_the_weights_do_not_have_are_refused(name, value, folder):
    change(folder / "config.json", **{name: value})
    assert f"{folder}/config.json: {name} is {value}, and the weights have" in refusal(folder)


@pytest.mark.parametrize("name", ["intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads"])
def test_models_that_would_need_more_memory_than_their_weights_are_refused(name, folder):
    change(folder / "config.json", **{name: 1 << 34, **({"head_dim": 2} if name != "head_dim" else {})})
    refusal(folder)


@pytest.mark.parametrize("value", ["641", -5, 0, 64.5, True, float("nan"), float("inf"), {"a": 1}, [[]]])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_sizes_of_wrong_types_are_refused(name, value, folder):
    if (name, value) in (("num_hidden_layers", 0), ("max_position_embeddings", 0)):
        pytest.skip("no number of layers, and no limit of positions")
    if name == "max_position_embeddings" and isinstance(value, dict | list):
        pytest.skip("transformers takes it for no limit")
    change(folder / "config.json", **{name: value})
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config", [1]),
        ("text_config", "x"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [5]),
        ("architectures", {"a": 1}),
        ("transformers_weights", 5),
        ("transformers_weights", "pytorch_model.bin"),
        ("quantization_config", "4"),
        ("model_type", 5),
        ("model_type", None),
        ("dtype", 5),
        ("rope_parameters", 7),
        ("rope_parameters", {"rope_type": "x"}),
    ],
)
def test_settings_of_wrong_types_are_refused(name, value, folder):
    change(folder / "config.json", **{name: value})
    refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        "[" * 100_000,
        '{"a": 1' + "0" * 5000 + "}",
        "\ud800",
        "null",
        "[]",
        "{}{}",
    ],
    ids=["deep", "deeper", "huge", "surrogate", "null", "list", "two"],
)
def test_json_that_is_no_settings_is_refused(file, content, folder):
    (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    refusal(folder)


@pytest.mark.parametrize("value", [5.5, True, {"content": 5}, {"id": 1}, [["a"]], {"content": ["x"]}])
@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_special_tokens_of_wrong_types_are_refused(name, value, folder):
    if name == "eos_token" or value != {"id": 1}:  # a token without content is none
        change(folder / "tokenizer_config.json", **{name: value, "eos_token": ... if name == "bos_token" else value})
        refusal(folder)


@pytest.mark.parametrize("bos", [ROWS, 10**12, -1, 10**30])
def test_a_first_token_without_a_row_is_refused(bos, folder):
    change(folder / "tokenizer_config.json", bos_token=bos)
    assert f"a text begins with token {bos}, and the model has rows for 0 to {ROWS - 1}" in refusal(folder)


def test_a_bos_that_was_added_without_a_row_is_refused_before_any_work(folder, tmp_path, byte_level, texts):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<{n}>" for n in range(97)])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", bos_token="<96>")
    assert "enlarge its embeddings" in refusal(folder)
    run = tiny_run.write(tmp_path, target=byte_level, sources={"s": folder}, rows=tiny_run.short(texts))
    ended = tiny_run.fuselm("run", run)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and not (tmp_path / "out").exists()


# ---- tokenizers


def normalized(folder: Path, *parts: normalizers.Normalizer) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence(list(parts))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_normalizer_that_multiplies_text_is_refused_before_it_reads_any(folder):
    normalized(folder, *[normalizers.Replace("a", "a" * 10)] * 30)
    assert "tokenizer.json: the normalizer makes up to 1e+30 bytes of one" in refusal(folder)
    normalized(folder, normalizers.Replace("e", "e" * 100_000))
    assert "the normalizer makes up to 1e+05 bytes of one" in refusal(folder)


def test_usual_normalizers_are_taken(folder):
    normalized(folder, normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁"), normalizers.Strip())
    locate_model(str(folder))


def framed(folder: Path, template: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<a>", "<b>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<a>", "<b>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_text_begins_with_what_the_tokenizer_puts_before_it(folder):
    plain = locate_model(str(folder))
    framed(folder, "$A <b>")
    assert locate_model(str(folder)).context_token == plain.context_token
    framed(folder, "<a> $A <b>")
    front = locate_model(str(folder))
    tokenizer = load_tokenizer(folder)
    assert front.context_token == tokenizer.token_to_id("<a>") != plain.context_token
    change(folder / "tokenizer_config.json", bos_token="<a>")
    said = locate_model(str(folder))
    assert said.context_token == front.context_token
    change(folder / "tokenizer_config.json", bos_token=None, eos_token=None)
    assert locate_model(str(folder)).context_token == front.context_token


def test_several_tokens_before_a_text_are_named(folder, caplog):
    framed(folder, "<a> <b> $A")
    with caplog.at_level(logging.WARNING, logger="fuselm"):
        model = locate_model(str(folder))
    (record,) = caplog.records
    assert "its tokenizer puts tokens" in record.getMessage() and model.context_token == 0


def test_the_fingerprint_of_a_tokenizer_says_what_a_text_begins_with(folder):
    """Check that keys of older versions hold where BOS or EOS say what a text begins with."""
    framed(folder, "<a> $A")
    change(folder / "tokenizer_config.json", bos_token="<a>")
    choice = json.dumps({"bos_token": "<a>", "eos_token": "<|endoftext|>"}, sort_keys=True)
    expected = tokenizer_files.digest_files([folder / "tokenizer.json"], choice)
    assert locate_model(str(folder)).tokenizer_fingerprint == expected
    change(folder / "tokenizer_config.json", bos_token="<b>")
    other = tokenizer_files.digest_files([folder / "tokenizer.json"], choice.replace("<a>", "<b>"))
    assert locate_model(str(folder)).tokenizer_fingerprint != other


# ---- what transformers has no causal language model for


def test_a_vision_language_model_is_refused_before_anything_is_made(byte_level, tmp_path, texts):
    text = {**SIZES, "hidden_size": 32, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 14},
        image_token_id=ROWS - 1,
        video_token_id=ROWS - 2,
        vision_start_token_id=ROWS - 3,
        vision_end_token_id=ROWS - 4,
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / "qwen")
    for path in byte_level.glob("tokenizer*.json"):
        shutil.copy(path, tmp_path / "qwen" / path.name)
    said = "transformers has no causal language model for Qwen2VLConfig"
    assert said in refusal(tmp_path / "qwen")
    rows = tiny_run.short(texts)
    for target, sources in (
        (byte_level, {"a": byte_level, "b": tmp_path / "qwen"}),
        (tmp_path / "qwen", {"a": byte_level}),
    ):
        run = tiny_run.write(tmp_path, target=target, sources=sources, rows=rows)
        ended = tiny_run.fuselm("run", run)
        assert ended.code == 2 and said in ended.err.splitlines()[-1] and not (tmp_path / "out" / "capture").exists()


def test_code_in_a_models_folder_is_not_run(folder, tmp_path):
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", "code.T"]}
    change(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="T")
    change(folder / "config.json", auto_map=auto)
    load_model(locate_model(str(folder)))  # by transformers' own class
    change(folder / "config.json", model_type="nonesuch")
    refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "transformers cannot load it" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_the_logits_of_a_located_model_are_transformers_own(folder):
    loaded = load_model(locate_model(str(folder)))
    ids = torch.tensor([[0, 5, 3, 7]])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        layer = forward.find_output_layer(loaded)
        ours = layer.compute_logits(forward.compute_hidden_states(loaded, layer, ids, torch.ones_like(ids))[0])
    torch.testing.assert_close(ours, expected[0], rtol=1e-5, atol=1e-6)


def test_ids_without_rows_are_refused_in_one_line(folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"zyx{n}" for n in range(97)])
    tokenizer.save(str(folder / "tokenizer.json"))
    corpus = tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": "one two"}])
    ended = tiny_run.fuselm("evaluate", folder, "--texts", corpus)
    assert ended.code == 2 and ended.out == "" and len(ended.err.splitlines()) == 1
    assert "697 tokens, but the model's output layer has 641 rows" in ended.err


def test_a_tokenizer_that_fails_on_a_text_is_refused_in_one_line(folder, tmp_path):
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    letters = [[c, -1.0] for c in "abcdefghijklmnopqrstuvwxyz 1"]
    pipeline |= {"model": {"type": "Unigram", "unk_id": None, "vocab": letters, "byte_fallback": False}}
    pipeline |= {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "normalizer": None}
    pipeline["added_tokens"][0]["id"] = len(letters)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    corpus = tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": "one 漢字"}])
    ended = tiny_run.fuselm("evaluate", folder, "--texts", corpus)
    assert ended.code == 2 and ended.out == "" and len(ended.err.splitlines()) == 1 and "Traceback" not in ended.err
