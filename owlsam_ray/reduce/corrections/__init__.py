"""Apply corrections made in a labelling tool to the labels of a run."""
