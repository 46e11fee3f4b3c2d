"""Tests of several sequences in one step."""
