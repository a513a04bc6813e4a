"""Adapters to the libraries that models are written in; each imports its library when imported.

`import attnkit` imports nothing of this folder, and nothing below knows it. What a foreign mask
means is read in `attnkit.masks.foreign`, by structure and without the library that made it.
"""
