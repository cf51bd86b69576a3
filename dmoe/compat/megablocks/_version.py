"""The release of MegaBlocks whose interface this is, and by whom: compares like 0.10.0."""

__version__ = "0.10.0+dmoe"
