"""Callbacks for the trainers of others, which report by `session`. Each module imports its library: `lightning`, `transformers`.

Outside of DistTrain they do nothing.
"""
