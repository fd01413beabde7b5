"""Name what can be done with rows that are no conversations that can be used."""

BAD_ROWS: dict[str, str] = {
    "refuse": "Refuse the run, and name the file and the line of the first.",
    "skip": "Leave them out, and count them.",
}
