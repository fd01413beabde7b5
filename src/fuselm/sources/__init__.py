"""Collect what the source models know: next-token distributions over the training texts, and texts they write.

capture.py reads documents with a model on this machine, ray_workers.py with several machines, and servers with models
behind HTTP; interchange converts distributions that others have kept. sampling.py and writing.py draw new texts.
"""
