"""Measuring models on this machine: time of a round, forecasts, and audits."""
