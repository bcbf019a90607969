"""Taps: what a loss or an explainer reads from a forward that the user makes anyway."""
