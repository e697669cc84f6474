"""Damaged inputs against every door that reads a user's files: `make fuzz`, or `python -m fuzz --count 10000 --seed 0`.

An input is accepted, and then it must be true; or it is refused in one line; all else is a fault: another exception, a
crash, a hang, too much memory, or a wrong success. Input n of a seed is always the same.
"""
