"""The files of an exported program, `.pte` and `.ptd`: writing, reading, digests, and what is inside them."""
