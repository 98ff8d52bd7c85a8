"""One model for many kinds of normal: visual inspection that learns from good parts only."""

__version__ = "0.1.0"
