"""Tests: what runs on a GPU only, and the scripts that export artifacts for it."""
