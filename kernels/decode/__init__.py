"""Operators for decoding one token: everything in a decoder layer except the experts."""
