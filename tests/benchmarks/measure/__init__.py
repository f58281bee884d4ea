"""The measurements, a module for each subject."""
