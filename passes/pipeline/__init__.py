"""In which order do a pipeline's stages work?  Schedules as tables, what they cost, and the best.

What is scheduled is in `schedule`, when it happens in `timeline`, whether it can be in `check`.
"""
