"""Tests: families, caches, decoder layers, sampling."""
