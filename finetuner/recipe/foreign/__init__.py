"""Recipes of other tools: what each of their keys means here."""
