"""Recipes on a cluster: which jobs they need, what a job does, and how far it is."""
