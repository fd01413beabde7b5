"""Draw pages and terminal tables from results.

`rendering` fills in templates, `formats` formats numbers, `styles` names colours, and `figures` draws SVG. There is a
module for each page (`report_page`, `diagnosis_page`, `fidelity_page`, `study_page`), for the token view of a run's
page (`token_view`), and for each table (`results_table`, `diagnosis_table`).
"""
