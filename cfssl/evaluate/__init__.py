"""Evaluation: features of a frozen encoder, probes on them, figures per group with intervals, audits of
generators.
"""
