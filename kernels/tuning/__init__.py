"""Tile configurations of an expert layer: checked-in tables by GPU and layer, and a heuristic where they have no entry."""
