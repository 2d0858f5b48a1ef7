"""Weights: the manifest and the files it names, config.json, and the ways to and from the Hub.

May import models, complexity, results and errors; never training or the command line.
"""
