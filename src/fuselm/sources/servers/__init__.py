"""Capture prompt log-probabilities from models behind HTTP servers, trusting nothing that can be checked.

connection.py finds a server's model and tries it, prompt_logprobs.py and id_protocols.py know what to ask and how to
read the answers, answers.py refuses impossible ones, and server_capture.py makes traces of the rest.
"""
