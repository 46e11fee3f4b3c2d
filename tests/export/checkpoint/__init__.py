"""Tests: stored shards, plans, streaming."""
