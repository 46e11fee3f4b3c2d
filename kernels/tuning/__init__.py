"""Tile configurations of an expert layer: checked-in tables by GPU and layer, else a heuristic."""
