"""A client that nobody looks into: a sandboxed worker, evidence of what it is, what is sealed to it."""
