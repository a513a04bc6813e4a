"""Wrong uses of the public API: tables of them, and what each must get (`test_bad_use`).

``python -m tests.bad_use --times`` runs them all outside of pytest, and prints the slowest.
"""
