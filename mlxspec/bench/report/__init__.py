"""What a benchmark leaves for people: tables, plots, and the files of `--report`."""
