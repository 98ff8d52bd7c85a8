"""Adapted-MoE (arXiv 2409.05611): one expert a subclass of normal, a router, and adaption to what was never seen."""
