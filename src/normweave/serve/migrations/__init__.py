"""How the store's tables came to be what they are: one file a step in `versions`, none of which is ever edited.

A change of the tables in `store.py` takes a new step, written by hand after the last one; the tests compare both.
"""
