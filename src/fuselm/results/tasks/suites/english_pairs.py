"""Make minimal pairs of English sentences: one is grammatical, and the other differs in one form or in word order."""

import random

NOUNS = {
    "teacher": "teachers", "farmer": "farmers", "author": "authors", "doctor": "doctors", "girl": "girls",
    "boy": "boys", "pilot": "pilots", "student": "students", "neighbor": "neighbors", "child": "children",
    "woman": "women", "man": "men", "driver": "drivers", "singer": "singers", "guest": "guests", "nurse": "nurses",
}  # fmt: skip
THINGS = {
    "book": "books", "letter": "letters", "key": "keys", "picture": "pictures", "box": "boxes", "knife": "knives",
    "chair": "chairs", "watch": "watches", "story": "stories", "shoe": "shoes", "lamp": "lamps", "coat": "coats",
}  # fmt: skip
VERBS = {  # third person singular, plural
    "walks": "walk", "sleeps": "sleep", "laughs": "laugh", "works": "work", "sings": "sing", "smiles": "smile",
    "waits": "wait", "reads": "read", "cooks": "cook", "swims": "swim", "complains": "complain", "listens": "listen",
}  # fmt: skip
ENDS = ["every morning", "in the garden", "at home", "after dinner", "near the river", "on Sundays", "all day"]
PLACES = ["table", "window", "door", "old bridge", "kitchen", "station", "church", "lake"]
PARTICIPLES = {  # participle, past
    "written": "wrote", "taken": "took", "eaten": "ate", "broken": "broke", "seen": "saw", "chosen": "chose",
    "forgotten": "forgot", "stolen": "stole", "hidden": "hid", "drawn": "drew", "thrown": "threw", "given": "gave",
}  # fmt: skip
ADJECTIVES = ["heavy", "new", "old", "strange", "small", "expensive", "famous", "broken", "clean", "dark"]
VOWELS = [
    "apple",
    "orange",
    "umbrella",
    "egg",
    "island",
    "engine",
    "arrow",
    "idea",
    "uncle",
    "insect",
    "office",
    "oven",
]
CONSONANTS = ["banana", "pencil", "garden", "spoon", "river", "ticket", "blanket", "castle", "window", "doctor"]
SELVES = {"girl": "herself", "boy": "himself", "woman": "herself", "man": "himself", "king": "himself",
          "queen": "herself", "uncle": "himself", "aunt": "herself", "mother": "herself", "father": "himself"}  # fmt: skip
HURT = ["hurt", "saw", "praised", "blamed", "introduced", "described", "admired", "protected"]


def _noun(r: random.Random) -> tuple[str, str, bool]:
    noun = r.choice(list(NOUNS))
    is_plural = r.random() < 0.5
    return noun, NOUNS[noun] if is_plural else noun, is_plural


def _verb(r: random.Random, is_plural: bool) -> tuple[str, str]:
    """Return the right and the wrong form."""
    verb = r.choice(list(VERBS))
    return (VERBS[verb], verb) if is_plural else (verb, VERBS[verb])


def agree(r: random.Random) -> tuple[str, str, str]:
    """Make a subject and its verb agree."""
    noun, form, is_plural = _noun(r)
    right, wrong = _verb(r, is_plural)
    end = r.choice(ENDS)
    return f"The {form} {right} {end}.", f"The {form} {wrong} {end}.", noun


def agree_over_phrase(r: random.Random) -> tuple[str, str, str]:
    """Put a noun of the other number between subject and verb."""
    thing, place, adjective = r.choice(list(THINGS)), r.choice(PLACES), r.choice(ADJECTIVES)
    is_plural = r.random() < 0.5
    form, other = (THINGS[thing], place) if is_plural else (thing, f"{place}s")
    right, wrong = ("are", "is") if is_plural else ("is", "are")
    start = f"The {form} near the {other.replace('churchs', 'churches')}"
    return f"{start} {right} {adjective}.", f"{start} {wrong} {adjective}.", thing


def agree_over_clause(r: random.Random) -> tuple[str, str, str]:
    """Put a relative clause with a subject of the other number between subject and verb."""
    noun, form, is_plural = _noun(r)
    other = r.choice([n for n in NOUNS if n != noun])
    right, wrong = _verb(r, is_plural)
    clause = f"that the {other} likes" if is_plural else f"that the {NOUNS[other]} like"
    end = r.choice(ENDS)
    return f"The {form} {clause} {right} {end}.", f"The {form} {clause} {wrong} {end}.", noun


def agree_in_clause(r: random.Random) -> tuple[str, str, str]:
    """Make the verb of a relative clause agree with its noun."""
    noun, form, is_plural = _noun(r)
    right, wrong = _verb(r, is_plural)
    start, end = f"I know the {form} who", r.choice(ENDS)
    return f"{start} {right} {end}.", f"{start} {wrong} {end}.", noun


def reflect(r: random.Random) -> tuple[str, str, str]:
    """Refer back with the right reflexive pronoun."""
    noun, verb = r.choice(list(SELVES)), r.choice(HURT)
    right = SELVES[noun]
    wrong = r.choice(["themselves", "himself" if right == "herself" else "herself"])
    return f"The {noun} {verb} {right}.", f"The {noun} {verb} {wrong}.", noun


def point(r: random.Random) -> tuple[str, str, str]:
    """Take a demonstrative of the noun's number."""
    thing, adjective = r.choice(list(THINGS)), r.choice(ADJECTIVES)
    is_plural = r.random() < 0.5
    right, wrong = r.choice([("these", "this"), ("those", "that")]) if is_plural else r.choice(
        [("this", "these"), ("that", "those")]
    )  # fmt: skip
    form = THINGS[thing] if is_plural else thing
    start = r.choice(["Please bring me", "She bought", "We found", "He sold"])
    return f"{start} {right} {adjective} {form}.", f"{start} {wrong} {adjective} {form}.", thing


def complete(r: random.Random) -> tuple[str, str, str]:
    """Take the participle after a form of have."""
    participle = r.choice(list(PARTICIPLES))
    subject, have = r.choice([("She", "has"), ("They", "have"), ("He", "had"), ("We", "had"), ("The girl", "has")])
    end = r.choice(["it", "the last one", "everything", "something", "too much"])
    return (
        f"{subject} {have} {participle} {end}.",
        f"{subject} {have} {PARTICIPLES[participle]} {end}.",
        participle,
    )


def take_article(r: random.Random) -> tuple[str, str, str]:
    """Take a or an."""
    noun, right, wrong = (r.choice(VOWELS), "an", "a") if r.random() < 0.5 else (r.choice(CONSONANTS), "a", "an")
    start = r.choice(["There was", "I saw", "She drew", "He thought of", "They needed", "We talked about"])
    return f"{start} {right} {noun}.", f"{start} {wrong} {noun}.", noun


def license_ever(r: random.Random) -> tuple[str, str, str]:
    """Take ever only after a negative quantifier."""
    noun = r.choice(list(NOUNS))
    end = r.choice(["seen the sea", "been to Rome", "read that book", "lived alone", "lost a game", "told a lie"])
    wrong = r.choice(["The", "That", "This"])
    return f"No {noun} has ever {end}.", f"{wrong} {noun} has ever {end}.", noun


def ask(r: random.Random) -> tuple[str, str, str]:
    """Ask with the verb's base form after do."""
    noun, form, is_plural = _noun(r)
    verb = r.choice(list(VERBS))
    do, end = "do" if is_plural else "does", r.choice(ENDS)
    where = r.choice(["Where", "Why", "When", "How often"])
    return f"{where} {do} the {form} {VERBS[verb]} {end}?", f"{where} {do} the {form} {verb} {end}?", noun


MAKERS = {
    "agreement": agree,
    "agreement over a phrase": agree_over_phrase,
    "agreement over a clause": agree_over_clause,
    "agreement in a clause": agree_in_clause,
    "reflexives": reflect,
    "demonstratives": point,
    "participles": complete,
    "articles": take_article,
    "negative polarity": license_ever,
    "questions": ask,
}
