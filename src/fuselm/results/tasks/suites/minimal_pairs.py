"""Make the questions of the minimal pairs in each language."""

from typing import Any

from fuselm.results.tasks.suites import english_pairs, french_pairs, german_pairs
from fuselm.results.tasks.suites.drawing import draw_pairs, make_dataset

MAKERS = {"english": english_pairs.MAKERS, "french": french_pairs.MAKERS, "german": german_pairs.MAKERS}
EACH = 80  # pairs of a phenomenon


def load(language: str, **_: Any) -> dict[str, Any]:
    """Return the pairs of a language as a data set."""
    return make_dataset(draw_pairs(MAKERS[language], each=EACH))
