"""A pretrained model made for a task, and how good it is at it.

matches.py   what expected and found texts have in common; how well two lists of scores agree
judge.py     responses scored from 0 to 100 by another model, over HTTP
"""
