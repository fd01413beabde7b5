"""Fuse the aligned distributions of several sources into one distribution for each token of the target.

fuse.py fuses single traces and whole stores. It asks weights.py how much each source has to say, pooling.py to make one
row of several, and tails.py what is known of the ids that a row has not kept.
"""
