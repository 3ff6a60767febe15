"""For tools that look for a setup.py: all metadata stands in pyproject.toml."""

from setuptools import setup

setup()
