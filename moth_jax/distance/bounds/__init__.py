"""Proven bounds of a network's outputs under any small trigger: what certified distances rest on.

`tape.py` writes a function down as affine steps and kinks, `relaxation.py` bounds them over all
triggers of a size, `knapsack.py` is that set of triggers, `linear.py` solves the case without
kinks exactly.
"""
