"""Tests: the commands `bench` and `tune`."""
