"""Several sequences in one step: a cache of slots, sampling by row, and the methods of such an export.

cache     `SlotKVCache`, and its views for one text in a slot, and for a row of each of several slots
methods   `BatchedLM`: `prefill` of a slot, `decode` of slot 0, `decode_batch` of all rows
sampling  the next token of each row, with settings of its own
"""
