"""Proof that a family's models are here what they are in Transformers, by models of random weights.

`python -m train.certify --family=NAME|all`
"""
