"""Secure aggregation: a server learns the sum of vectors of integers, and nothing about one of them."""
