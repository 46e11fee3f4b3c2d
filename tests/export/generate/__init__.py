"""Tests: text from an exported model."""
