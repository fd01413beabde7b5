"""Capture prompt log-probabilities from models behind HTTP servers, trusting nothing that can be checked.

server.py finds a server's model and tries it, endpoints.py and id_protocols.py know what to ask and how to read the
answers, answers.py refuses impossible ones, and remote.py makes traces of the rest.
"""
