"""Meet the machine that fuselm runs on: files, processes, the terminal, and text and errors that others wrote.

- What stages write: `manifest` (the stage contract), `atomic_files`, `remote_paths` (object
  stores), `temporaries`, `file_lock`, `fingerprints` and `disk_errors`.
- Who writes it: `part_work` (a folder made by parts, in several processes) and `claims` (each part once).
- The machine: `machine` (cores, memory), `processes` (of one run), `background` (a thread that writes), `compiling`
  (kernels, compiled once) and `index_checks` (checks of what they index with).
- What people see: `terminal`, `streams`, `progress`, `durations`, `foreign_text`, `public_names`.
- What comes from elsewhere: `addresses` and `server_keys` of servers, `errors` and `library_output` of other libraries,
  and repositories of the Hugging Face Hub (`hub_repositories`).
"""
