"""Name what can be done with bad rows and near repeats, and how splits are chosen."""

BAD_ROWS: dict[str, str] = {
    "refuse": "Refuse the run, and name the file and the line of the first.",
    "skip": "Leave them out, and count them.",
}

SPLITTING: dict[str, str] = {
    "draw": "Draw exact shares of each domain at random. More text draws other documents.",
    "hash": "Choose by a hash of each text, which gives about these shares. More text moves no document from one split "
    "to another, and training text that is in the other splits, too, cannot come about.",
}

NEAR_REPEATS: dict[str, str] = {
    "ignore": "Look for exact repeats only, which are always dropped.",
    "count": "Say how many there are, and train on them.",
    "drop": "Leave them out of the training text.",
}
