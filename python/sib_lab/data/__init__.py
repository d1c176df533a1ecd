"""Data sets with exact object masks."""
