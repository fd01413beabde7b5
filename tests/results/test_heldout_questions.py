"""Questions about held-out documents: what is asked, and that it depends on the documents alone."""

import math
from collections import Counter

import pytest

from fuselm.documents.corpus import Document
from fuselm.results.tasks import heldout_questions as questions


@pytest.fixture(scope="module")
def domains(quickstart) -> dict[str, list[Document]]:
    result: dict[str, list[Document]] = {}
    for n, row in enumerate(quickstart):
        document = Document(id=f"{n}", origin=f"{n}", domain=row["domain"], split="heldout", text=row["text"])
        result.setdefault(row["domain"], []).append(document)
    return {domain: documents[:23] for domain, documents in result.items()}


# ---- the questions


def test_a_cloze_is_the_beginning_of_its_document_up_to_a_last_word(domains):
    for documents in domains.values():
        texts = {d.origin: d.text for d in documents}
        asked = questions.ask_last_words(documents)
        assert len({item["document"] for item in asked}) > 17
        for item in asked:
            text, known = texts[item["document"]], f"{item['context']} {item['word']}"
            assert text.startswith(known) and len(item["context"]) >= questions.BEFORE
            assert len(item["word"]) >= 4 and item["word"].isalpha()
            after = text[len(known) :]
            assert after[:1] in (*".!?…", "") or not any(c.isalnum() for c in after.partition("\n")[0])


def test_a_continuation_is_the_documents_own_among_those_of_others_after_the_same_word(domains):
    for documents in domains.values():
        texts = {d.origin: d.text for d in documents}
        asked = questions.ask_continuations(documents)
        assert len(asked) == questions.CONTINUATIONS and len({item["document"] for item in asked}) == len(documents)
        for item in asked:
            own, choices = item["choices"][item["gold"]], item["choices"]
            word = item["context"].split()[-1]
            assert f"{item['context']} {own}" in texts[item["document"]]
            assert len(set(choices)) == 4
            for choice in set(choices) - {own}:
                assert any(f"{word} {choice}" in t for origin, t in texts.items() if origin != item["document"])
            assert all(len(c.encode()) <= questions.LENGTH or not any(map(str.isspace, c)) for c in choices)
            assert len(item["context"]) <= questions.TOLD
        assert all(count > 11 for count in Counter(item["gold"] for item in asked).values())


@pytest.mark.parametrize("make", [questions.ask_last_words, questions.ask_continuations])
def test_questions_depend_on_the_documents_alone(domains, make):
    documents = domains["english"]
    assert make(documents) == make(list(documents))


def test_every_document_is_asked_about_before_any_is_asked_about_twice_as_often(domains, monkeypatch):
    monkeypatch.setattr(questions, "LAST_WORDS", 47)
    counts = Counter(item["document"] for item in questions.ask_last_words(domains["technical_english"]))
    assert counts.total() == 47 and max(counts.values()) <= 3


def test_little_text_gives_no_questions(domains):
    short = [
        Document(id=d.id, origin=d.origin, domain="a", split="heldout", text=d.text[:97]) for d in domains["english"]
    ]
    assert questions.ask_last_words(short) == questions.ask_continuations(short) == []
    assert questions.ask_continuations(domains["english"][:3]) == []


def test_a_right_choice_has_its_bits_among_the_choices():
    results = [(-3.0, False), (-1.0, True), (-2.0, False)]
    shares = [math.exp(-3), math.exp(-1), math.exp(-2)]
    scores = questions.score_choice({"choices": ["ab", "c", "defgh"], "gold": 2}, results)
    assert scores == {"acc": 0.0, "acc_norm": 1.0, "bits": pytest.approx(-math.log2(shares[2] / sum(shares)))}
    assert questions.score_choice({"good": "a", "bad": "b"}, results[1:]) == {
        "acc": 1.0,
        "bits": pytest.approx(-math.log2(shares[1] / (shares[1] + shares[2]))),
    }
