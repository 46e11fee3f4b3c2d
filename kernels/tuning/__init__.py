"""Tile configurations of an expert layer.

configs  `GemmConfig`, and the largest one that fits a GPU's shared memory
tables   the checked-in tables in tuned/, by GPU and layer
choose   which configurations a layer runs with: those of the tables, else of a heuristic
"""
