"""The autoregressive transformer over continuous tokens.

Two models share one interface (`autoregressive`): `masked`, as published, and `causal`. `training` trains either.
"""
