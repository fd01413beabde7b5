"""Make minimal pairs of German sentences: one is grammatical, and the other differs in one form or in word order."""

import random

PEOPLE = {  # singular with its article, plural
    "der Lehrer": "Lehrer", "der Nachbar": "Nachbarn", "der Arzt": "Ärzte", "der Bauer": "Bauern",
    "der Sänger": "Sänger", "der Junge": "Jungen", "die Frau": "Frauen", "die Tante": "Tanten",
    "die Schwester": "Schwestern", "die Königin": "Königinnen", "das Kind": "Kinder", "das Mädchen": "Mädchen",
    "der Gast": "Gäste", "der Fahrer": "Fahrer",
}  # fmt: skip
THINGS = {  # noun: article, plural
    "Buch": ("das", "Bücher"), "Haus": ("das", "Häuser"), "Messer": ("das", "Messer"), "Fenster": ("das", "Fenster"),
    "Bild": ("das", "Bilder"), "Auto": ("das", "Autos"), "Tisch": ("der", "Tische"), "Stuhl": ("der", "Stühle"),
    "Brief": ("der", "Briefe"), "Schlüssel": ("der", "Schlüssel"), "Apfel": ("der", "Äpfel"), "Hut": ("der", "Hüte"),
    "Lampe": ("die", "Lampen"), "Tür": ("die", "Türen"), "Uhr": ("die", "Uhren"), "Tasche": ("die", "Taschen"),
    "Straße": ("die", "Straßen"), "Stadt": ("die", "Städte"),
}  # fmt: skip
VERBS = {  # third person singular, plural
    "schläft": "schlafen", "arbeitet": "arbeiten", "singt": "singen", "liest": "lesen", "wartet": "warten",
    "lacht": "lachen", "kocht": "kochen", "schreibt": "schreiben", "läuft": "laufen", "spielt": "spielen",
}  # fmt: skip
ENDS = ["jeden Tag", "im Garten", "zu Hause", "am Morgen", "in der Küche", "nach dem Essen"]
ADJECTIVES = "groß klein alt neu schön schwer grün rot billig seltsam".split()
PARTICIPLES = {  # right, made as if the verb were regular
    "gelesen": "gelest", "geschrieben": "geschreibt", "gefunden": "gefindet", "getrunken": "getrinkt",
    "gegessen": "gegesst", "genommen": "genehmt", "gesehen": "geseht", "geholfen": "gehelft", "gesungen": "gesingt",
    "gebracht": "gebringt",
}  # fmt: skip
MOVED = "gegangen gekommen gefallen geblieben gestorben aufgewacht gewachsen verschwunden".split()
DONE = "gearbeitet gelacht gewartet geschlafen getanzt geweint geantwortet gehustet".split()
SEPARABLE = {"steht": ("auf", "aufsteht"), "kommt": ("an", "ankommt"), "ruft": ("an", "anruft"),
             "macht": ("mit", "mitmacht"), "geht": ("weg", "weggeht"), "fängt": ("an", "anfängt"),
             "schläft": ("ein", "einschläft"), "hört": ("auf", "aufhört")}  # fmt: skip
PRONOUNS = {"Ich": "mich", "Du": "dich", "Er": "sich", "Sie": "sich", "Wir": "uns", "Ihr": "euch"}
REFLECTED = [  # verbs that are always reflexive, for each of the pronouns
    ["beeile", "beeilst", "beeilt", "beeilt", "beeilen", "beeilt"],
    ["schäme", "schämst", "schämt", "schämt", "schämen", "schämt"],
    ["irre", "irrst", "irrt", "irrt", "irren", "irrt"],
]
ARTICLES = ("der", "die", "das")
DATIVE = {"der": "dem", "die": "der", "das": "dem"}
ACCUSATIVE = {"der": "den", "die": "die", "das": "das"}
ENDINGS = {"der": "er", "die": "e", "das": "es"}  # after ein in the nominative


def _person(r: random.Random) -> tuple[str, str, bool]:
    """Return a noun, the noun phrase at the start of a sentence, and whether it is plural."""
    noun = r.choice(list(PEOPLE))
    is_plural = r.random() < 0.5
    return noun, f"Die {PEOPLE[noun]}" if is_plural else noun[0].upper() + noun[1:], is_plural


def _verb(r: random.Random, is_plural: bool) -> tuple[str, str]:
    verb = r.choice(list(VERBS))
    return (VERBS[verb], verb) if is_plural else (verb, VERBS[verb])


def agree(r: random.Random) -> tuple[str, str, str]:
    """Make a subject and its verb agree."""
    noun, phrase, is_plural = _person(r)
    right, wrong = _verb(r, is_plural)
    end = r.choice(ENDS)
    return f"{phrase} {right} {end}.", f"{phrase} {wrong} {end}.", noun


def agree_over_phrase(r: random.Random) -> tuple[str, str, str]:
    """Put a noun of the other number between subject and verb."""
    thing, place = r.choice(list(THINGS)), r.choice(list(THINGS))
    is_plural = r.random() < 0.5
    article, plural = THINGS[thing]
    near = f"neben {DATIVE[THINGS[place][0]]} {place}" if is_plural else "neben den Häusern"
    start = f"Die {plural} {near}" if is_plural else f"{article.capitalize()} {thing} {near}"
    right, wrong = ("sind", "ist") if is_plural else ("ist", "sind")
    adjective = r.choice(ADJECTIVES)
    return f"{start} {right} {adjective}.", f"{start} {wrong} {adjective}.", thing


def agree_over_clause(r: random.Random) -> tuple[str, str, str]:
    """Put a relative clause between subject and verb."""
    noun, phrase, is_plural = _person(r)
    other = r.choice([n for n in PEOPLE if n != noun])
    right, wrong = _verb(r, is_plural)
    pronoun = "die" if is_plural else ACCUSATIVE[noun[:3]]
    clause = f"{pronoun} {other} kennt" if is_plural else f"{pronoun} die {PEOPLE[other]} kennen"
    end = r.choice(ENDS)
    return f"{phrase}, {clause}, {right} {end}.", f"{phrase}, {clause}, {wrong} {end}.", noun


def take_article(r: random.Random) -> tuple[str, str, str]:
    """Take the article of the noun's gender."""
    thing, adjective = r.choice(list(THINGS)), r.choice(ADJECTIVES)
    right = THINGS[thing][0]
    wrong = r.choice([a for a in ARTICLES if a != right])
    be = r.choice(["ist", "war", "wird", "bleibt"])
    return f"{right.capitalize()} {thing} {be} {adjective}.", f"{wrong.capitalize()} {thing} {be} {adjective}.", thing


def take_case(r: random.Random) -> tuple[str, str, str]:
    """Take the case that a preposition needs."""
    thing = r.choice(list(THINGS))
    article = THINGS[thing][0]
    preposition, right, wrong = r.choice(
        [("mit", DATIVE, ACCUSATIVE), ("von", DATIVE, ACCUSATIVE), ("für", ACCUSATIVE, DATIVE), ("ohne", ACCUSATIVE, DATIVE)]
    )  # fmt: skip
    start = r.choice(["Sie kommt", "Er lebt", "Wir reden", "Das ist", "Ich gehe"])
    return f"{start} {preposition} {right[article]} {thing}.", f"{start} {preposition} {wrong[article]} {thing}.", thing


def put_verb_last(r: random.Random) -> tuple[str, str, str]:
    """Put the verb last in a subordinate clause."""
    thing = r.choice(list(THINGS))
    article = ACCUSATIVE[THINGS[thing][0]]
    verb = r.choice(["sieht", "kauft", "sucht", "findet", "braucht", "verkauft"])
    start = r.choice(["Ich glaube, dass", "Er lacht, weil", "Sie fragt, ob", "Wir wissen, dass"])
    who = r.choice(["sie", "er", "Anna", "Peter"])
    return f"{start} {who} {article} {thing} {verb}.", f"{start} {who} {verb} {article} {thing}.", thing


def take_auxiliary(r: random.Random) -> tuple[str, str, str]:
    """Take sein with verbs of motion, and haben with others."""
    is_motion = r.random() < 0.5
    participle = r.choice(MOVED if is_motion else DONE)
    right, wrong = ("ist", "hat") if is_motion else ("hat", "ist")
    who, when = r.choice(["Er", "Sie", "Peter", "Anna", "Das Kind"]), r.choice(["gestern", "lange", "allein", "heute"])
    return f"{who} {right} {when} {participle}.", f"{who} {wrong} {when} {participle}.", participle


def end_adjective(r: random.Random) -> tuple[str, str, str]:
    """End an adjective after the indefinite article as the noun's gender asks."""
    thing, adjective = r.choice(list(THINGS)), r.choice([a for a in ADJECTIVES if a != "teuer"])
    article = THINGS[thing][0]
    ein = "eine" if article == "die" else "ein"
    wrong = r.choice([ENDINGS[a] for a in ARTICLES if a != article])
    start = r.choice(["Das ist", "Dort steht", "Hier liegt", "Es war"])
    return f"{start} {ein} {adjective}{ENDINGS[article]} {thing}.", f"{start} {ein} {adjective}{wrong} {thing}.", thing


def take_participle(r: random.Random) -> tuple[str, str, str]:
    """Take the participle of an irregular verb."""
    right = r.choice(list(PARTICIPLES))
    who, when = r.choice(["Er hat", "Sie hat", "Wir haben", "Ich habe"]), r.choice(["gestern viel", "heute nichts", "immer", "oft", "lange"])  # fmt: skip
    return f"{who} {when} {right}.", f"{who} {when} {PARTICIPLES[right]}.", right


def separate(r: random.Random) -> tuple[str, str, str]:
    """Put the prefix of a separable verb at the end of a main clause."""
    if r.random() < 0.5:
        who = r.choice(list(PRONOUNS))
        right, verb = PRONOUNS[who], r.choice(REFLECTED)[list(PRONOUNS).index(who)]
        wrong = r.choice([p for p in ("mich", "dich", "sich", "uns") if p != right])
        end = r.choice(["sehr", "oft", "heute", "schon wieder", "nicht"])
        return f"{who} {verb} {right} {end}.", f"{who} {verb} {wrong} {end}.", f"reflexive {who}"
    verb = r.choice(list(SEPARABLE))
    prefix, whole = SEPARABLE[verb]
    who, when = (
        r.choice(["Er", "Sie", "Anna", "Peter"]),
        r.choice(["um sechs Uhr", "heute", "immer spät", "morgen früh"]),
    )
    return f"{who} {verb} {when} {prefix}.", f"{who} {whole} {when}.", verb


MAKERS = {
    "agreement": agree,
    "agreement over a phrase": agree_over_phrase,
    "agreement over a clause": agree_over_clause,
    "articles": take_article,
    "cases": take_case,
    "word order": put_verb_last,
    "auxiliaries": take_auxiliary,
    "adjectives": end_adjective,
    "participles": take_participle,
    "prefixes and reflexives": separate,
}
