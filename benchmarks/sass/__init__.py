"""What nvcc made of each kernel, and what that predicts: the parts of sass_report.py."""
