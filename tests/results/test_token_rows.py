"""Test the rows of the token view against the models' own softmax and the run's stores."""

import json
import math
import re

import numpy as np
import pytest
import torch
from page_runs import pages
from transformers import AutoModelForCausalLM

from fuselm.documents.document import Document
from fuselm.documents.document_list import read_documents
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.token_text import show_token
from fuselm.results import token_rows
from fuselm.results.pages.token_view import describe_choice
from fuselm.stores.store import Store

__all__ = ["pages"]  # a fixture


@pytest.fixture(scope="module")
def run(pages):
    return pages["report"].parent


@pytest.fixture(scope="module")
def shown(pages) -> dict:
    html = pages["report"].read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="token-data">(.*?)</script>', html)[1])


def find(run, name):
    return run / json.loads((run / "run.json").read_text())["folders"][name]


def make_documents(**counts: int) -> list[Document]:
    return [
        Document(id=f"{d}{n}", origin=f"{d}{n}", domain=d, split="train", text="x")
        for d, count in counts.items()
        for n in range(count)
    ]


def test_documents_are_chosen_evenly_from_every_domain():
    chosen = [d.id for d in token_rows.choose_documents(make_documents(a=12, b=3), "train")]
    assert chosen == ["a2", "a6", "a10", "b0", "b1", "b2"]
    many = token_rows.choose_documents(make_documents(**{f"d{n}": 2 for n in range(11)}), "train")
    assert len({d.domain for d in many}) == len(many) == token_rows.MOST_DOCUMENTS
    assert token_rows.choose_documents(make_documents(a=3), "heldout") == []


def test_the_page_says_how_many_documents_it_shows_of_how_many(shown):
    counts = {split: sum(d["split"] == split for d in shown["documents"]) for split in token_rows.SPLITS}
    assert min(counts.values()) > 0 and all(counts[s] <= shown["splits"][s] for s in counts)
    assert describe_choice(shown) == (
        f"Shown are {counts['heldout']} of the {shown['splits']['heldout']} held-out documents and {counts['train']} "
        f"of the {shown['splits']['train']} training documents, evenly spaced within each domain, and at most the "
        f"first {token_rows.MOST_TOKENS} tokens of each."
    )


@pytest.mark.parametrize("name", ["base", "clm", "fused"])
def test_rows_of_models_are_those_of_their_dense_softmax(run, shown, byte_level, name):
    folder = byte_level if name == "base" else find(run, f"train {name}") / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    located = locate_model(str(folder))
    vocabulary = load_vocabulary(located)
    texts = {d.id: d.text for d in read_documents(find(run, "corpus"))}
    for document in shown["documents"]:
        ids = vocabulary.segment(texts[document["id"]]).ids[: token_rows.MOST_TOKENS]
        inputs = torch.tensor([[located.context_token, *ids[:-1]]])
        with torch.inference_mode():
            logprobs = model(inputs).logits[0].float().log_softmax(-1)
        rows = document["rows"][name]
        gold = -logprobs[range(len(ids)), ids.tolist()] / math.log(2)
        assert np.allclose(rows["bits"], gold, atol=0.002)
        for i, row in enumerate(rows["top"]):
            assert [n / 1000 for n in row[1::2]] == pytest.approx(
                logprobs[i].exp().topk(token_rows.ENTRIES).values.tolist(), abs=0.001
            )
        assert document["gold"] == [shown["strings"].index(show_token(vocabulary.token_bytes[i])) for i in ids.tolist()]


def test_rows_of_sources_and_the_fusion_are_those_of_the_stores(run, shown):
    stores = {"own": find(run, "align own"), "other": find(run, "align other"), "fusion": find(run, "fuse")}
    for document in shown["documents"]:
        if document["split"] == "heldout":
            assert set(document["rows"]) == {"base", "clm", "fused"}
            continue
        for name, folder in stores.items():
            rows, trace = document["rows"][name], Store(folder).read(document["id"])
            for i, (bits, top) in enumerate(zip(rows["bits"], rows["top"], strict=True)):
                if not trace.distributions.informed[i]:
                    assert bits is None and top is None
                    continue
                _, logprobs = trace.distributions.row(i)
                best = np.sort(np.exp(logprobs))[::-1][: token_rows.ENTRIES]
                assert bits == pytest.approx(-float(trace.distributions.gold[i]) / math.log(2), abs=0.001)
                assert [n / 1000 for n in top[1::2]] == pytest.approx(best.tolist(), abs=0.001)


def test_pieces_spell_the_text(run, shown):
    texts = {d.id: d.text for d in read_documents(find(run, "corpus"))}
    for document in shown["documents"]:
        text = texts[document["id"]].encode()[: document["bytes"]].decode(errors="ignore")
        spelled = "".join(document["pieces"])
        assert spelled == text or "\\x" in spelled
