"""Reward models brought here by a command, and converted: the one part of the package that opens connections
and reads pickles. No block and nothing else of the package imports it.
"""
