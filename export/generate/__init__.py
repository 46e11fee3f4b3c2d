"""Generates text with an exported model."""
