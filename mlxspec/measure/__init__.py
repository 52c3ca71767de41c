"""Measuring models on this machine: the time of a round, forecasts, and audits."""
