"""ZPPO: Zone of Proximal Policy Optimization (arXiv 2606.18216), an independent open implementation."""

__version__ = "0.1.0"
