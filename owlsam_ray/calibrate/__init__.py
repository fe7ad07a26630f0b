"""From labelled images to a score threshold for each category, for a precision, a recall, or the best F1."""
