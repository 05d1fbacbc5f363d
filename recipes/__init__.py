"""Recipes: YAML files that say what differs from the defaults. Installed as package data."""
