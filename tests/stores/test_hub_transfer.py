"""hub_transfer.py: a store is pushed to a stand-in for the Hub by the command, and pulled back to the same bytes."""

import shutil
from pathlib import Path

import drawn
import numpy as np
import pytest
import yaml
from hub_server import fuselm, hub, start  # noqa: F401
from same_stores import assert_same

from fuselm.stores.store import Store, write_index, write_part
from fuselm.system.manifest import Recipe, build_once

TEXTS = {"first": "abba", "second": "a b\u00e9 b", "third": "baab"}
NAME = "me/rows"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a store of two parts."""
    vocabulary, random = drawn.byte_pairs([(0, 1), (2, 0)]), np.random.default_rng(0)
    traces = [drawn.trace_of(vocabulary, text, random, top_k=3, document=name) for name, text in TEXTS.items()]

    def build(partial: Path) -> dict:
        write_part(partial, 0, traces[:2])
        write_part(partial, 1, traces[2:])
        return write_index(partial)

    recipe = Recipe(stage="capture", parameters={"policy": "top_k", "top_k": 3}, about={"model": "owner/model|<b>"})
    build_once(tmp_path / "store", recipe, build)
    return tmp_path / "store"


def test_a_store_comes_back_in_the_same_bytes(hub, folder, tmp_path):
    code, out, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    assert (code, out) == (0, f"{hub.url}/datasets/{NAME}\n"), err
    assert "%|" not in err
    pushed = hub.repositories["datasets", NAME]
    assert not pushed.private and pushed.commits == 1
    made = Store(folder).manifest
    assert pushed.files.keys() == {"README.md", "manifest.json", *made["files"]}
    code, out, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "pulled", token=None)
    assert (code, out) == (0, f"{tmp_path / 'pulled'}: 3 documents, {made['counts']['tokens']} tokens\n"), err
    assert_same(tmp_path / "pulled", folder)
    assert {p.name for p in (tmp_path / "pulled").iterdir()} == {"manifest.json", *made["files"]}
    assert fuselm(hub, tmp_path, "store", "verify", tmp_path / "pulled")[0] == 0
    again = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "pulled")
    where = tmp_path / "pulled"
    assert again[::2] == (2, f"fuselm: {where}: there already, and nothing is overwritten; name another folder\n")


def test_the_card_says_what_the_store_holds_and_how_to_open_it(hub, folder, tmp_path):
    fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    card = hub.repositories["datasets", NAME].files["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown" and front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": "part-*.parquet"}]
    assert f"fuselm store pull {NAME} STORE" in text and 'fuselm.Store("STORE")' in text
    assert "| documents | 3, and 0 skipped |" in text and "policy top_k, top_k 3" in text
    assert "`owner/model|<b>`" in text and r"| model | owner/model\|&lt;b&gt; |" in text
    assert "they are unknown here" in text


def test_a_private_repository_is_made_and_read_with_a_token_only(hub, folder, tmp_path):
    assert fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME, "--private")[0] == 0
    assert hub.repositories["datasets", NAME].private
    code, _, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out", token=None)
    assert (code, err) == (
        2,
        f"fuselm: {NAME}: not on the Hub, or private; check the name, or run `hf auth login`\n",
    )
    assert fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")[0] == 0


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder, tmp_path):
    assert fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)[0] == 0
    before = dict(hub.repositories["datasets", NAME].files)
    code, _, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME, "--private")
    assert code == 2 and f"{NAME}: is there already and public, so --private cannot hold" in err
    assert hub.repositories["datasets", NAME].files == before


def test_a_killed_push_is_resumed_and_sends_nothing_twice(hub, folder, tmp_path):
    hub.accepts_more.clear()
    process = start(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    first = hub.objects  # the server holds all uploads back, then lets those in that have arrived
    while not any(request.startswith("PUT") for request in hub.requests):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    hub.accepts_more.set()
    assert hub.has_put.wait(30)
    assert first and hub.repositories["datasets", NAME].commits == 0
    code, _, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    assert code == 0, err
    assert set(hub.puts.values()) == {1}
    assert fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")[0] == 0
    assert_same(tmp_path / "out", folder)


def test_an_interrupted_pull_is_resumed(hub, folder, tmp_path):
    fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    files = hub.repositories["datasets", NAME].files
    held = files.pop("part-00001.parquet")
    code, _, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")
    assert code == 2 and "what arrived is not a whole store and was deleted" in err and "part-00001.parquet" in err
    assert not (tmp_path / "out").exists()
    files["part-00001.parquet"] = held
    hub.repositories["datasets", NAME].commits += 1
    (tmp_path / "out.partial").mkdir(exist_ok=True)
    shutil.copyfile(folder / "part-00000.parquet", tmp_path / "out.partial" / "part-00000.parquet")
    assert fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")[0] == 0
    assert_same(tmp_path / "out", folder)
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_store_is_not_pushed(hub, folder, tmp_path):
    data = (folder / "part-00001.parquet").read_bytes()
    (folder / "part-00001.parquet").write_bytes(data[:-1])
    code, _, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    assert code == 2 and "part-00001.parquet" in err and "`fuselm store subset` makes a whole store" in err
    assert not hub.repositories


def test_a_repository_that_changed_on_its_way_is_refused(hub, folder, tmp_path):
    fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    files = hub.repositories["datasets", NAME].files
    files["part-00000.parquet"] = files["part-00000.parquet"][:-1] + b"x"
    code, _, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")
    assert code == 2 and "checksum differs" in err and "part-00000.parquet" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_repository_without_a_store_is_refused(hub, folder, tmp_path):
    fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME)
    del hub.repositories["datasets", NAME].files["manifest.json"]
    code, _, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (
        2,
        f"fuselm: {NAME}: not a store that fuselm pushed (it has no manifest.json); check the name",
    )


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "the Hub needs a token that may write there; run `hf auth login`, or set HF_TOKEN"),
        ("hf_another", "the Hub refuses the token (HTTP 401); run `hf auth login` with one that may write there"),
    ],
)
def test_a_push_without_a_valid_token_says_how_to_log_in(hub, folder, tmp_path, token, says):
    code, _, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", NAME, token=token)
    assert (code, err.splitlines()[-1]) == (2, f"fuselm: {NAME}: {says}")


def test_a_hub_that_is_not_there_is_one_line(hub, folder, tmp_path):
    hub.url = "http://127.0.0.1:9"
    code, _, err = fuselm(hub, tmp_path, "store", "pull", NAME, tmp_path / "out")
    assert code == 2 and f"{NAME}: could not be downloaded (" in err and "it resumes here" in err
    assert len([line for line in err.splitlines() if line.startswith("fuselm:")]) == 1


@pytest.mark.parametrize("name", ["rows", "me/rows/more", "https://huggingface.co/me/rows", "../rows"])
def test_a_name_that_is_no_repository_is_refused_before_any_work(hub, folder, tmp_path, name):
    code, _, err = fuselm(hub, tmp_path, "store", "push", folder, "--repo", name)
    says = f"fuselm: {name}: not the name of a repository on the Hub; write it as owner/name\n"
    assert (code, err, hub.requests) == (2, says, [])
