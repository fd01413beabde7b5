"""Exchange distributions with other tools: import their files as stores, and export stores as files they read.

foreign.py reads and writes the layouts, distillkit.py decompresses DistillKit's rows, and derivation.py derives what a
layout does not tell. importing.py and exporting.py convert whole files.
"""
