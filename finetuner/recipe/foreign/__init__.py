"""Recipes of other tools, and the meaning of their keys here."""
