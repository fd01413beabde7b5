"""Define the commands: `main` has all but those on stores, which `store_cli` has; `endings` ends each with its code.

`warm_up` compiles all kernels of a usual run before the first one.
"""
