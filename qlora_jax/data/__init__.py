"""From a data file to batches: rows (formats), tokens and the loss mask (rendering), batches (loader).

`docstrings` makes the demo's rows out of the running Python's own documentation.
"""
