"""Measurements side by side, each in one run. Nothing here is part of the package."""
