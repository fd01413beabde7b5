"""Offer the commands: `main` defines them, `store_cli` those on stores; `endings` says how they end.

`warm_up` compiles all kernels of a usual run before the first one.
"""
