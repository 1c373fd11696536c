"""The exams; each has a package whose `exam` module has `examine`."""
