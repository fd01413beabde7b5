"""Make minimal pairs of French sentences: one is grammatical, and the other differs in one form or in word order."""

import random

PEOPLE = {  # singular, plural, feminine
    "professeur": ("professeurs", False), "voisin": ("voisins", False), "médecin": ("médecins", False),
    "garçon": ("garçons", False), "fermier": ("fermiers", False), "chanteur": ("chanteurs", False),
    "fille": ("filles", True), "femme": ("femmes", True), "voisine": ("voisines", True), "sœur": ("sœurs", True),
    "mère": ("mères", True), "chanteuse": ("chanteuses", True), "reine": ("reines", True), "client": ("clients", False),
}  # fmt: skip
MASCULINE = "livre jardin pain couteau chapeau fromage bateau verre problème village train mur stylo lit camion bras marché soleil".split()  # fmt: skip
FEMININE = "maison table chaise lettre fenêtre voiture porte pomme ville clé montre rue route robe lampe plage cuisine forêt".split()  # fmt: skip
ADJECTIVES = {  # masculine, feminine
    "grand": "grande", "petit": "petite", "vert": "verte", "ouvert": "ouverte", "lourd": "lourde", "blanc": "blanche",
    "neuf": "neuve", "vieux": "vieille", "beau": "belle", "long": "longue", "fermé": "fermée", "cher": "chère",
}  # fmt: skip
VERBS = {  # third person singular, plural
    "mange": "mangent", "dort": "dorment", "travaille": "travaillent", "chante": "chantent", "lit": "lisent",
    "attend": "attendent", "part": "partent", "rit": "rient", "court": "courent", "écrit": "écrivent",
}  # fmt: skip
ENDS = ["tous les jours", "dans le jardin", "à la maison", "le matin", "près de la gare", "après le dîner"]
MOVED = {"parti": "partie", "venu": "venue", "arrivé": "arrivée", "tombé": "tombée", "resté": "restée",
         "né": "née", "mort": "morte", "sorti": "sortie", "rentré": "rentrée", "allé": "allée"}  # fmt: skip
SUBJUNCTIVES = {"viennes": "viens", "fasses": "fais", "sois": "es", "ailles": "vas", "prennes": "prends",
                "saches": "sais", "puisses": "peux", "dises": "dis", "lises": "lis", "partes": "pars"}  # fmt: skip
SAID = {"je": "mange", "tu": "manges", "il": "comprend", "elle": "travaille", "nous": "dormons", "vous": "partez",
        "ils": "chantent", "elles": "attendent", "on": "sort"}  # fmt: skip
PRONOUNS = {
    "je": "me",
    "tu": "te",
    "il": "se",
    "elle": "se",
    "nous": "nous",
    "vous": "vous",
    "ils": "se",
    "elles": "se",
}
REFLECTED = [  # verbs that are always reflexive, for each of the pronouns
    "souviens souviens souvient souvient souvenons souvenez souviennent souviennent".split(),
    "méfie méfies méfie méfie méfions méfiez méfient méfient".split(),
    "moque moques moque moque moquons moquez moquent moquent".split(),
]
ABOUT = ["de tout", "de lui", "du voisin", "de la reine", "de Paul", "de cette ville"]


def _person(r: random.Random) -> tuple[str, str, bool]:
    """Return a noun, the noun phrase, and whether it is plural."""
    noun = r.choice(list(PEOPLE))
    plural, is_feminine = PEOPLE[noun]
    if r.random() < 0.5:
        return noun, f"les {plural}", True
    return noun, f"{'la' if is_feminine else 'le'} {noun}", False


def _verb(r: random.Random, is_plural: bool) -> tuple[str, str]:
    verb = r.choice(list(VERBS))
    return (VERBS[verb], verb) if is_plural else (verb, VERBS[verb])


def _begin(text: str) -> str:
    return text[0].upper() + text[1:]


def agree(r: random.Random) -> tuple[str, str, str]:
    """Make a subject and its verb agree."""
    noun, phrase, is_plural = _person(r)
    right, wrong = _verb(r, is_plural)
    end = r.choice(ENDS)
    return f"{_begin(phrase)} {right} {end}.", f"{_begin(phrase)} {wrong} {end}.", noun


def agree_over_phrase(r: random.Random) -> tuple[str, str, str]:
    """Put a noun of the other number between subject and verb."""
    is_plural = r.random() < 0.5
    thing, (noun, (plural, is_feminine)) = r.choice(MASCULINE[:4] + FEMININE[:12]), r.choice(list(PEOPLE.items()))
    if thing in MASCULINE:
        thing, article, place = r.choice(["livre", "jardin", "verre", "village"]), "le", "là-bas"
    else:
        article, place = "la", "là-bas"
    start = (
        f"Les {thing}s {'de la' if is_feminine else 'du'} {noun}"
        if is_plural
        else f"{_begin(article)} {thing} des {plural}"
    )
    right, wrong = ("sont", "est") if is_plural else ("est", "sont")
    return f"{start} {right} {place}.", f"{start} {wrong} {place}.", thing


def agree_over_clause(r: random.Random) -> tuple[str, str, str]:
    """Put a relative clause with a subject of the other number between subject and verb."""
    noun, phrase, is_plural = _person(r)
    other = r.choice([n for n in PEOPLE if n != noun])
    plural, is_feminine = PEOPLE[other]
    clause = f"que {'la' if is_feminine else 'le'} {other} connaît" if is_plural else f"que les {plural} connaissent"
    right, wrong = _verb(r, is_plural)
    end = r.choice(ENDS)
    return f"{_begin(phrase)} {clause} {right} {end}.", f"{_begin(phrase)} {clause} {wrong} {end}.", noun


def take_article(r: random.Random) -> tuple[str, str, str]:
    """Take the article of the noun's gender."""
    is_feminine = r.random() < 0.5
    noun = r.choice(FEMININE if is_feminine else MASCULINE)
    right, wrong = r.choice([("la", "le"), ("une", "un"), ("cette", "ce")] if is_feminine else [("le", "la"), ("un", "une"), ("ce", "cette")])  # fmt: skip
    start = r.choice(["Je vois", "Il cherche", "Nous avons trouvé", "Elle regarde", "Voici"])
    return f"{start} {right} {noun}.", f"{start} {wrong} {noun}.", noun


def agree_adjective(r: random.Random) -> tuple[str, str, str]:
    """Make an adjective agree with its noun."""
    masculine = r.choice(list(ADJECTIVES))
    is_feminine = r.random() < 0.5
    noun = r.choice(FEMININE if is_feminine else MASCULINE)
    right, wrong = (ADJECTIVES[masculine], masculine) if is_feminine else (masculine, ADJECTIVES[masculine])
    be = r.choice(["est", "était", "sera", "semble"])
    start = f"{'La' if is_feminine else 'Le'} {noun} {be} très"
    return f"{start} {right}.", f"{start} {wrong}.", noun


def agree_participle(r: random.Random) -> tuple[str, str, str]:
    """Make a participle after être agree with its subject."""
    masculine = r.choice(list(MOVED))
    subject, is_feminine = r.choice([("Elle", True), ("Il", False), ("Ma mère", True), ("Mon père", False),
                                     ("La reine", True), ("Le roi", False), ("Marie", True), ("Paul", False)])  # fmt: skip
    right, wrong = (MOVED[masculine], masculine) if is_feminine else (masculine, MOVED[masculine])
    end = r.choice(["hier soir", "en avril", "avec nous", "à Paris", "sans bruit"])
    return f"{subject} est {right} {end}.", f"{subject} est {wrong} {end}.", masculine


def contract(r: random.Random) -> tuple[str, str, str]:
    """Contract de and à with le."""
    noun = r.choice(MASCULINE)
    start, right, wrong = r.choice([("Il parle", "du", "de le"), ("Nous avons besoin", "du", "de le"),
                                    ("Elle pense", "au", "à le"), ("Ils reviennent", "du", "de le"),
                                    ("Je m'intéresse", "au", "à le")])  # fmt: skip
    return f"{start} {right} {noun}.", f"{start} {wrong} {noun}.", noun


def take_subjunctive(r: random.Random) -> tuple[str, str, str]:
    """Take the subjunctive where it is needed."""
    right = r.choice(list(SUBJUNCTIVES))
    start = r.choice(
        ["Il faut que tu", "Je veux que tu", "Il est possible que tu", "Elle attend que tu", "Bien que tu"]
    )
    end = r.choice(["maintenant", "ce soir", "tout de suite", "demain", "seul"])
    end = f"{end}, nous restons" if start.startswith("Bien") else end
    return f"{start} {right} {end}.", f"{start} {SUBJUNCTIVES[right]} {end}.", right


def negate(r: random.Random) -> tuple[str, str, str]:
    """Put the verb between the parts of a negation."""
    subject = r.choice(list(SAID))
    word = r.choice(["pas", "plus", "jamais"])
    ne = "n'" if SAID[subject][0] in "aeé" else "ne "
    end = r.choice(ENDS)
    verb = SAID[subject]
    return f"{_begin(subject)} {ne}{verb} {word} {end}.", f"{_begin(subject)} ne {word} {verb} {end}.", subject


def reflect(r: random.Random) -> tuple[str, str, str]:
    """Take the reflexive pronoun of the subject's person."""
    subject = r.choice(list(PRONOUNS))
    verb = r.choice(REFLECTED)[list(PRONOUNS).index(subject)]
    right = PRONOUNS[subject]
    wrong = r.choice([p for p in ("me", "te", "se") if p != right])
    about = r.choice(ABOUT)
    return f"{_begin(subject)} {right} {verb} {about}.", f"{_begin(subject)} {wrong} {verb} {about}.", subject


MAKERS = {
    "agreement": agree,
    "agreement over a phrase": agree_over_phrase,
    "agreement over a clause": agree_over_clause,
    "articles": take_article,
    "adjectives": agree_adjective,
    "participles": agree_participle,
    "contractions": contract,
    "subjunctive": take_subjunctive,
    "negation": negate,
    "reflexives": reflect,
}
