"""Name the fusion functions and the parts of a text that they average over, and describe each.

`weights.WEIGHT_FUNCTIONS` has the function that computes the weights of each. docs/paper.md compares them.
"""

FUNCTIONS: dict[str, str] = {
    "min_ce": "Take the row of the source that predicts the text best (MinCE in the paper).",
    "avg_ce": "Average the rows; the better a source predicts the text, the more it weighs (AvgCE in the paper).",
    "log_linear": "Weigh sources as `avg_ce` does, but take the geometric mean of their rows.",
    "entropy": "Average the rows; the surer a source is, the more it weighs. This does not look at the next token.",
    "bayes": "Average the rows; the better a source predicted the document up to the token, the more it weighs.",
    "fixed": "Average the rows with the same weights at every token of a domain, those in `weights`.",
}
LEVELS: dict[str, str] = {
    "document": "Decide once for each document.",
    "window": "Decide once for each window of `window` bytes.",
    "token": "Decide again at each token.",
}
WHENS: dict[str, str] = {
    "stage": "Align and fuse in stages of their own, into stores that training reads.",
    "load": "Align and fuse each document when training reads it, and store only those of a sample.",
}
SAMPLE = "sample_tokens"  # in the recipe of an aligned store: it has the first tokens of each domain alone, so many
LEVELLESS = ("bayes", "fixed")  # functions that do not average over a part of the text, so they ignore `level`
SHARPENED = ("avg_ce", "log_linear", "entropy")  # functions that use `sharpness`
NOT_LINEAR = ("log_linear", "entropy")  # functions whose results are not linear in the rows
