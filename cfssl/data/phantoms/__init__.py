"""Worlds with a known causal model: every exogenous factor is kept, so true counterfactuals exist."""
