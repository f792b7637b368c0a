"""Keep vectors, index and export of a root up to date with a corpus that changes."""
