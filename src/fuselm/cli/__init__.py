"""Define the commands: most in `main`, those on stores in `store_cli`, and `clean` in `clean_cli`.

`endings` ends each of them with its exit code. `warm_up` compiles all kernels of a usual run before the first one.
"""
