"""Evaluation of models: tasks, scores, intervals, comparison."""
