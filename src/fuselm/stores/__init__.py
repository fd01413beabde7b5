"""Keep next-token distributions on disk, and read, check, merge and cut them.

Capture, alignment and fusion each write one store: a folder of Parquet files with one row per document, an index and a
manifest. `store.Store` reads it, `rows.Trace` is one document of it, and `distributions.Distributions` holds that
document's sparse distributions. `retention` decides which entries are kept, `rounding` how they are written,
`verification` whether a store is whole, `merging` makes stores from stores, and `sharing` knows which runs share a
folder of them. docs/store.md describes the format.
"""
