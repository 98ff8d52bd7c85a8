"""Drift: what changed on the line since the calibration, in which subclass, since when, and why. numpy only.

statistics → reference (of the calibration images, in the bundle) → tests over time → monitor → causes
"""
