"""Ask models the tasks of lm-eval and compare their answers question by question.

`catalogue` finds tasks, those that come with fuselm in `suites` among them, and tells one from another by a hash.
`asking` has a model answer them, `reading` computes log-probabilities so that questions about one text cost one reading
of it, and `sandbox` runs code that a model wrote. `answers` keeps a row for each question, `comparison` makes numbers
and paired differences of them, and `heldout_questions` asks about a run's own held-out documents.
"""
