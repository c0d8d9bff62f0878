"""Towers inside other people's frameworks, one module each."""
