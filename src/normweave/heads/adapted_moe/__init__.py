"""Adapted-MoE (arXiv 2409.05611): one expert per subclass, a router, and test-time adaption."""
