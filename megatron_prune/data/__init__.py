"""From files of text to batches of tokens.

Nothing is imported here: the preprocessing workers start without torch, the trainer without pyarrow.
"""
