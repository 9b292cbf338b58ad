"""Attention by Hand: forward and backward passes of Transformer attention, written out and checked."""

__version__ = "0.1.0"
