"""Certificates: what no attack inside a ball can change, one file for each method."""
