"""Experts of Adapted-MoE, one file for each type; `base.Experts` is their contract."""
