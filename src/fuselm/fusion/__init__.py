"""Fuse the aligned distributions of several sources into one distribution for each token of the target.

`fuse` fuses single traces and whole stores. `weights` computes each source's weight, `pooling` makes one row of
several, and `tails` estimates the probabilities of ids that a row has not kept. `choices` lists what a run file may
choose, and `priors` spreads a run file's weights over domains.
"""
